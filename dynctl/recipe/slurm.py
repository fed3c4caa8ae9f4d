"""The part of a recipe that is about Slurm."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from dynctl.protocol.instances import Role
from dynctl.recipe.section import Section
from dynctl.recipe.units import Duration


def _sbatch_value(value: object) -> object:
    if isinstance(value, bool):
        return value
    text = str(value) if isinstance(value, int | float | str) else "\n"
    if "\n" in text or "\r" in text or "\0" in text:
        raise ValueError("must be a text of one line, a number, or true")
    return text


def _het(value: object) -> object:
    return ({} if value else None) if isinstance(value, bool) else value


Count = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(pattern=r"^[^\n\r\x00]*$")]
"""One line."""
SbatchValue = Annotated[str | bool, BeforeValidator(_sbatch_value)]


class SlurmPart(Section):
    """Nodes of one kind."""

    partition: Word = ""
    """Partition; default: Slurm's own."""
    nodes: Count | None = None
    """Number of nodes; default: as few as the roles need."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs on each node; default: those of `gres`, else as many as the roles need, at most 8."""
    gres: Word = ""
    """Generic resources of each node, like gpu:a100:8, instead of gpus_per_node."""
    cpus_per_task: Count | None = None
    """CPUs on each node; default: all of an exclusive one, else the partition's own."""
    mem: Annotated[str, Field(pattern=r"^([0-9]+[KMGT]?)?$")] = ""
    """Memory of each node, like 500G; 0 takes all of it."""
    constraint: Word = ""
    """Features that nodes must have."""
    exclude: Word = ""
    """Nodes that are not to be used, like n[1-2]."""
    nodelist: Word = ""
    """Nodes that must be used."""
    exclusive: bool = False
    """Take whole nodes."""


class SlurmHet(Section):
    """A part of the job for each role, with what is different there."""

    prefill: SlurmPart = Field(default_factory=SlurmPart)
    """Nodes of prefill workers."""
    decode: SlurmPart = Field(default_factory=SlurmPart)
    """Nodes of decode workers."""
    aggregated: SlurmPart = Field(default_factory=SlurmPart)
    """Nodes of workers that do both."""

    def part(self, role: Role) -> SlurmPart:
        """The part of a role."""
        found: SlurmPart = getattr(self, role)
        return found


class Slurm(SlurmPart):
    """What is asked of Slurm. All of it may be left out: nodes and GPUs follow from the roles."""

    account: Word = ""
    """Account to charge."""
    qos: Word = ""
    """Quality of service."""
    time: Annotated[Duration, Field(ge=60)] | None = None
    """Time limit; default: the partition's own."""
    reservation: Word = ""
    """Reservation."""
    het: Annotated[SlurmHet | None, BeforeValidator(_het, json_schema_input_type=bool | SlurmHet | None)] = (
        None
    )
    """Give each role a part of the job of its own: true, or what is different for a role."""
    spares: Annotated[int, Field(ge=0)] = 0
    """Further nodes, in each part of the job, that take over from lost ones; no_kill then holds too."""
    no_kill: bool = False
    """When a node is lost, go on with the others; else Slurm ends the job. Not if it is the first node."""
    follow_up: bool = True
    """Have another job give nodes: for replicas that this one has no room for, and in the place of a lost
    one.
    """
    grow_within: Annotated[Duration, Field(ge=0)] = 1800.0
    """So long a job for more replicas may be pending, then they are given up; 0: as long as it takes."""
    comment: Word = ""
    """Comment of the job."""
    warning: Annotated[Duration, Field(ge=0)] = 120.0
    """So long before the time limit the service drains and ends; 0: it is cut off there."""
    mpi: Annotated[str, Field(pattern="^[a-z0-9_]+$")] = "pmix"
    """How the ranks of an engine on several nodes find each other, as of srun --mpi."""
    stage: str = ""
    """Directory on the nodes' own disks to which the model is copied before engines load it."""
    resubmit: Annotated[Duration, Field(ge=0)] = 0.0
    """So long before the limit a successor is submitted, which gets the name once it is ready; 0: none."""
    sbatch_args: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9-]*$")], SbatchValue] = Field(
        default_factory=dict
    )
    """Further options of sbatch by name; true for one without a value."""
