"""Where in our models each signal is taken, in words for people who read a store years later."""

from collections.abc import Iterable

_ANY = {
    "node": "scalar features that the energy head reads",
    "v2v": "vector features after the last block",
    "atomic_energies": "energy head before the sum, plus the references of the elements",
}
_OF_MODEL = {
    "PaiNN": {"edge": "product of the vector features of an edge's two atoms, summed over x, y, z"},
    "GemNetOC": {
        "layer/H0": "embedding of the atoms",
        "layer/X0": "atom features of the output block before the first interaction block",
        "node": "x_E: atom features of all output blocks, mixed; input of the energy head",
        "edge": "x_F: edge features of all output blocks, mixed; input of the force head",
        "e2n": "x_F summed over the incoming edges",
        "v2v": "x_F times the edge's direction from sender to receiver, summed over the incoming edges",
    },
}
_LAYERS = {
    "M": "scalar features after message block {}",
    "U": "scalar features after update block {}",
    "MV": "vector features after message block {}",
    "UV": "vector features after update block {}",
    "I": "scalar features after interaction block {}",
    "H": "atom features after interaction block {}",
    "X": "atom features of the output block after interaction block {}",
}


def places(architecture: str, signals: Iterable[str]) -> dict[str, str]:
    """Return signal -> place for the signals of one of our models, energy and forces left out."""
    known = _ANY | _OF_MODEL.get(architecture, {})
    return {name: known.get(name) or _layer(name) for name in signals if name not in ("energy", "forces")}


def _layer(name: str) -> str:
    tap = name.removeprefix("layer/")
    kind = tap.rstrip("0123456789")
    return _LAYERS.get(kind, "features {}").format(tap.removeprefix(kind))
