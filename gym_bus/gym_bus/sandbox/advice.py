"""What would mend a refused level on this machine: the command or setting, as exactly as the kernel lets us know."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from gym_bus.sandbox import landlock
from gym_bus.sandbox.protections import Level

_NEEDED = {"CHOWN": 0, "KILL": 5, "SETGID": 6, "SETUID": 7}
"""Capabilities without which programs cannot get another user outside of a namespace."""
_SWITCHES = (
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)
_NO_REASON_FOUND = (
    "the kernel must have user namespaces (CONFIG_USER_NS), and the worker must not run in a chroot; in a container: "
    "docker run --security-opt apparmor=unconfined --security-opt seccomp=unconfined"
)


def to_get(level: Level, root: Path = Path("/")) -> str:
    """What to do to have `level`; `root` is the file tree whose /proc and /sys say how things are."""
    found = _for_namespaces(root) if level is Level.NAMESPACES else _for_landlock(root)
    return f"for level {level}: {'; and '.join(found)}"


def _for_namespaces(root: Path) -> list[str]:
    settings = root / "proc/sys"
    found = [
        f"sysctl -w user.{file.name}=15000"
        for file in sorted((settings / "user").glob("max_*_namespaces"))
        if _read(file) == "0" and file.name != "max_time_namespaces"
    ]
    found += [command for name, closed, command in _SWITCHES if _read(settings / name) == closed]
    return [*found, *_unconfined(root)] or [_NO_REASON_FOUND]


def _unconfined(root: Path) -> list[str]:
    """How a container or a service is started without what refuses the calls."""
    in_the_way = {
        "seccomp": ("seccompProfile", _status(root, "Seccomp") not in ("", "0")),
        "apparmor": ("appArmorProfile", _read(root / "proc/self/attr/current").endswith("(enforce)")),
    }
    kinds = {kind: field for kind, (field, active) in in_the_way.items() if active}
    if not kinds:
        return []
    docker = " ".join(f"--security-opt {kind}=unconfined" for kind in kinds)
    kubernetes = ", ".join(f"securityContext.{field}.type: Unconfined" for field in kinds.values())
    return [
        f"start it without what confines it: docker run {docker} (Kubernetes: {kubernetes}; systemd: "
        "RestrictNamespaces=no and no SystemCallFilter)"
    ]


def _for_landlock(root: Path) -> list[str]:
    found = []
    abi, missing = landlock.version(), missing_capabilities(root)
    add = " ".join(f"--cap-add {name}" for name in missing)
    if abi == 0:
        found.append(_why_no_landlock(root))
    elif missing and os.geteuid() == 0:
        found.append(f"run it as another user (docker run --user 1000:1000), or root with {add}")
    elif missing and abi < landlock.SCOPES:
        found.append(
            f"Linux 6.12 (Landlock version {landlock.SCOPES}, here is {abi}), or a worker that may give programs "
            f"another user: run as root with {add}"
        )
    if not missing and (closed := _closed_folder(Path(sys.base_prefix))):
        found.append(f"chmod o+rx {closed}, or an interpreter that lies elsewhere: every user must be able to read it")
    return found or ["the kernel must have Landlock (Linux 5.13 for root, 6.12 for other users)"]


def _why_no_landlock(root: Path) -> str:
    match landlock.refusal():
        case errno.EOPNOTSUPP:
            modules = _read(root / "sys/kernel/security/lsm") or "..."
            return f"boot the kernel with lsm=landlock,{modules}"
        case errno.EPERM | errno.EACCES:
            return (
                "the container's filter must allow landlock_create_ruleset, landlock_add_rule and "
                "landlock_restrict_self: docker run --security-opt seccomp=unconfined, or a newer Docker"
            )
    return "a kernel with Landlock: Linux 5.13 (6.12 for a worker that is not root) with CONFIG_SECURITY_LANDLOCK"


def missing_capabilities(root: Path = Path("/")) -> tuple[str, ...]:
    """Of those that a process needs to give programs another user."""
    held = int(_status(root, "CapEff") or "0", 16)
    return tuple(name for name, number in _NEEDED.items() if not held >> number & 1)


def _closed_folder(path: Path) -> Path | None:
    """The first folder on the way to `path` that other users cannot enter."""
    way = [*reversed(path.parents), path]
    return next((folder for folder in way if folder.is_dir() and not folder.stat().st_mode & 0o001), None)


def _status(root: Path, key: str) -> str:
    lines = (line.partition(":") for line in _read(root / "proc/self/status").splitlines())
    return next((value.strip() for name, _, value in lines if name == key), "")


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
