"""What is compared with what: a baseline, or a policy and its plan. Benchmarks, runs and evaluations speak of these."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from .passes.plan import Plan, kv_share
from .policy import Policy


@dataclass(frozen=True)
class Variant:
    """A way to run a decode step: a baseline by its name, or a policy and the plan that it makes of the model."""

    name: str
    policy: Policy | None = None
    plan: Plan | None = None

    @property
    def chooses(self) -> bool:
        """Whether a selection chooses tokens, so that a budget means something."""
        return self.policy is not None and any(
            role.role == "select" and not role.method.attends for role in self.policy.roles
        )

    @property
    def is_sparse(self) -> bool:
        """Whether some layer leaves tokens out."""
        return self.policy is not None and any(role.is_sparse for role in self.policy.roles)

    @property
    def digest(self) -> str:
        """A digest of what the policy says."""
        roles = json.dumps([dataclasses.asdict(role) for role in self.policy.roles])
        return hashlib.sha256(roles.encode()).hexdigest()[:12]

    def kv_share(self, length: int) -> float:
        """The share of the cached tokens that a step reads at `length` live tokens; 1 for a baseline."""
        return 1.0 if self.plan is None else kv_share(self.plan, length)
