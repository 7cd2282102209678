"""An experiment-tracked training framework. Here: the entrance, the Python API and what all rooms share."""


def __getattr__(name: str) -> object:
    """Give `train`, `load` and `runs`, and import what they need only once one of them is asked for."""
    if name not in ("train", "load", "runs"):
        raise AttributeError(f"module 'tracklight' has no attribute {name!r}")
    from tracklight import api

    return getattr(api, name)
