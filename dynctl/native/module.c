/* The module of the compiled parts. Each has its like in Python, which does the same (dynctl/native/load.py). */
#include "native.h"

#ifndef DYNCTL_SOURCE
#define DYNCTL_SOURCE "" /* digest of all sources, which dynctl/native/load.py compares */
#endif

int add_type(PyObject *module, const char *title, PyType_Spec *spec)
{
    PyObject *type = PyType_FromSpec(spec);
    if (type == NULL)
        return -1;
    int added = PyModule_AddObjectRef(module, title, type);
    Py_DECREF(type);
    return added;
}

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_compiled", NULL, -1, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__compiled(void)
{
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL)
        return NULL;
    if (add_relay(module) < 0 || add_words(module) < 0 || add_walk(module) < 0 || add_holders(module) < 0 ||
        PyModule_AddStringConstant(module, "SOURCE", DYNCTL_SOURCE) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
