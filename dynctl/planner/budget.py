"""Replicas within a GPU budget. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from dynctl.protocol.instances import Role


def within(
    needs: Mapping[Role, int], least: Mapping[Role, int], gpus: Mapping[Role, int], budget: int
) -> dict[Role, int]:
    """What of `needs` the budget (0 = none) allows, none below `least`, in proportion to what each needs.

    From the least on, whoever has the smallest share of what it needs gets the next replica, as long as one
    fits. The least is given in any case.
    """
    if not budget or sum(needs[role] * gpus[role] for role in needs) <= budget:
        return dict(needs)
    given = {role: min(least[role], needs[role]) for role in needs}
    left = budget - sum(given[role] * gpus[role] for role in needs)
    while True:
        short = [role for role in needs if given[role] < needs[role] and gpus[role] <= left]
        if not short:
            return given
        role = min(short, key=lambda one: (given[one] / needs[one], one))
        given[role] += 1
        left -= gpus[role]


def share(given: Mapping[Role, int], needs: Mapping[Role, int]) -> float:
    """The smallest share of what it needs that a role is given, at most 1."""
    return min((min(1.0, given[role] / needs[role]) for role in needs if needs[role]), default=1.0)
