from dataclasses import dataclass


@dataclass(frozen=True)
class Unsupported:
    operator: str
    node: str
    why: str
