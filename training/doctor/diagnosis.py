"""What an examination found."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """Something odd: `kind` in two or three words; `message` as a sentence, which the name of a picture opens."""

    kind: str
    message: str
    path: Path | None = None  # None: it is about the dataset


@dataclass(frozen=True)
class Diagnosis:
    """All that was found, the tokens of each picture's longest caption, and the groups of near-duplicates."""

    findings: tuple[Finding, ...] = ()
    tokens: dict[Path, int] = field(default_factory=dict)
    clusters: tuple[tuple[Path, ...], ...] = ()
    limit: int = 0  # tokens that the model takes in one piece; 0 when they were not counted

    def of(self, path: Path | None) -> list[Finding]:
        """What was found about one picture; None: about the dataset."""
        return [finding for finding in self.findings if finding.path == path]
