"""The protocol of a result: everything that decides its figures, and its keys."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Protocol:
    """What was measured and how.

    Attributes:
        threat_model: what the attack saw.
        attack: the attack's own record: name, library and version, norm, eps and its unit, every parameter.
        seed, batch_size: of the attack.
        passes: final passes over the attacked images that are averaged.
        dataset: name, split, which images, how many, their size and fingerprint.
        classifier: name and fingerprint.
        purifier: name, fingerprint, options, whether it is randomised; `None` for the bare classifier.
        source: name and fingerprint of the surrogate pipeline of `transfer`, and its purifier's options if it has any.
    """

    threat_model: str
    attack: dict[str, Any]
    seed: int
    batch_size: int
    passes: int
    dataset: dict[str, Any]
    classifier: dict[str, Any]
    purifier: dict[str, Any] | None
    source: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Hash of the whole protocol; names of models and data are not part of it, their fingerprints are."""
        return _hash(_without_names(asdict(self)))

    def attacked_key(self) -> str:
        """Hash of what attacks depend on beside the images: of the purifier only where the attack meets it."""
        about = _without_names(asdict(self))
        del about["passes"], about["dataset"]
        if self.threat_model == "gray-box":
            del about["purifier"]
            about["threat_model"] = "classifier"
        elif self.threat_model == "transfer":
            del about["purifier"], about["classifier"]
        elif self.purifier is None:
            del about["purifier"]
            about["threat_model"] = "classifier"
        return _hash(about)

    def record(self) -> dict[str, Any]:
        """The head of a record: `schema`, `key`, `protocol`."""
        return {"schema": SCHEMA, "key": self.key, "protocol": asdict(self)}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _without_names(value: dict[str, Any]) -> dict[str, Any]:
    trimmed = dict(value)
    for part in ("dataset", "classifier", "purifier", "source"):
        if trimmed[part] is not None:
            trimmed[part] = {key: item for key, item in trimmed[part].items() if key not in ("name", "split", "images")}
    return trimmed
