from typing import TypedDict

class LossFacts(TypedDict):
    number: int
    name: str
    parameters: list[str]
    reads_scores: bool
    takes_anchors: bool

def build_facts() -> dict[str, str]: ...
def losses() -> list[LossFacts]: ...
def failed_allocation() -> tuple[int, str, str] | None: ...
