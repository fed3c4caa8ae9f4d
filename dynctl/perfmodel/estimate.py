"""What an estimator of costs promises. Pure."""

from __future__ import annotations

from typing import Protocol

from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Profile


class Estimator(Protocol):
    """Tells what layouts of one model on one kind of GPU with one engine cost, without running it.

    The same arguments give the same profile.
    """

    def profile(self, layout: Layout) -> Profile:
        """Costs of one replica, with `limits`, `subject` and `source`.

        Raises ProfileError that gives the reason, in words for people, why a layout cannot be: sizes that do
        not divide, weights that do not fit, no memory left for KV.
        """
        ...
