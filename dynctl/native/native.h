/* What the compiled parts share: Python's stable interface, and how each adds itself to the one module. */
#ifndef DYNCTL_NATIVE_H
#define DYNCTL_NATIVE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

int add_type(PyObject *module, const char *title, PyType_Spec *spec); /* module.c */
int add_relay(PyObject *module);                                     /* relay.c */
int add_words(PyObject *module);                                     /* words.c */
int add_walk(PyObject *module);                                      /* walk.c */
int add_holders(PyObject *module);                                   /* holders.c */

#endif
