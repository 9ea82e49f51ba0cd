"""Refuses to start with older libraries than this package was made for, among them those with known holes."""

from importlib import metadata

from packaging.requirements import Requirement

from spade_t5.errors import ConfigError

DISTRIBUTION = "spade-t5"


def check_requirements() -> None:
    """Compares what is installed with what the package's metadata demands; nothing without metadata, as in a bare checkout.

    Raises:
        ConfigError: a library is older, or newer, than it may be.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        return
    for requirement in requirements:
        extras = ("", *metadata.metadata(DISTRIBUTION).get_all("Provides-Extra", ()))
        if requirement.marker is not None and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if not requirement.specifier.contains(version, prereleases=True):
            raise ConfigError(
                f"{requirement.name} {version} is installed, but {DISTRIBUTION} needs {requirement.specifier}; "
                f"run pip install '{requirement.name}{requirement.specifier}'"
            )
