"""What a Space installs: what hf-unigd needs, in the versions of this environment, where the model was tried."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


_PACKAGE = "hf-unigd"
# Processors of some backbones need these. Where torchvision is installed, transformers prepares images with it.
_IF_INSTALLED = ("num2words", "torchvision")


def pinned_requirements(*extras: str) -> list[str]:
    """
    The packages that hf-unigd needs here, sorted by name and each with the version that is installed.

    Args:
        extras: Extras of hf-unigd.

    Raises:
        ImportError: one of them is not installed, or the installed hf-unigd is one without the extras.
    """
    if unknown := set(extras) - set(metadata(_PACKAGE).get_all("Provides-Extra") or []):
        raise ImportError(
            f"The hf-unigd that was installed here has no extra {', '.join(sorted(unknown))}: it is older than this "
            "code. Install it again."
        )
    pinned = {}
    for name in _needed(("", *extras)):
        try:
            pinned[name] = _installed(name)
        except PackageNotFoundError as error:
            wanted = f"{_PACKAGE}[{','.join(extras)}]"
            raise ImportError(
                f"The Space needs {name}, which is not installed here: `pip install '{wanted}'`."
            ) from error
    for name in _IF_INSTALLED:
        try:
            pinned[name] = _installed(name)
        except PackageNotFoundError:
            continue
    return [f"{name}=={found}" for name, found in sorted(pinned.items())]


def _needed(extras: tuple[str, ...]) -> Iterator[str]:
    for line in requires(_PACKAGE) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": each}) for each in extras):
            continue
        if canonicalize_name(requirement.name) == _PACKAGE:
            yield from _needed(tuple(requirement.extras))
        else:
            yield canonicalize_name(requirement.name)


def _installed(name: str) -> str:
    return Version(version(name)).public  # without the build, such as +cpu, which the Space chooses
