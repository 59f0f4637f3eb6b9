"""The file tree that programs see: the interpreter, shared libraries, four devices and a private scratch folder.

Standard library only: runs in the zygote, before it locks itself in.
"""

from __future__ import annotations

import os

from gym_bus.sandbox import syscalls

DEVICES = ("null", "zero", "full", "random", "urandom")
SCRATCH = "/tmp"
_TOOLS = ("/usr", "/etc/alternatives", "/etc/ld.so.cache")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_READ_ONLY = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID


def shared(interpreter: str) -> list[str]:
    """What programs read: the interpreter and the shared libraries."""
    return [interpreter, *_LIBRARIES]


def open_sources(interpreter: str, packages: dict[str, list[str]], *, tools: bool) -> dict[str, int]:
    """Descriptors of everything that will be bound in, by its path inside.

    `packages`: names by folder; the folders get other paths inside, see `package_folders`.

    Opened within the new mount namespace, whose mounts alone can be bound, and before the change of user: the new
    one may not reach them by path (a home folder is closed to it), and a new mount may hide them.
    """
    wanted = [*shared(interpreter), *(f"/dev/{name}" for name in DEVICES)]
    if tools:
        wanted = [path for path in (*wanted, *_TOOLS) if not path.startswith("/usr/")]
    sources = {path: path for path in wanted if os.path.exists(path)}
    for inside, (outside, names) in zip(package_folders(packages), packages.items(), strict=True):
        sources |= {f"{inside}/{name}": f"{outside}/{name}" for name in names}
    return {inside: os.open(outside, os.O_PATH | os.O_CLOEXEC) for inside, outside in sources.items()}


def package_folders(packages: dict[str, list[str]]) -> list[str]:
    """Where programs find what is in `packages`: the host's own paths may be hidden, below /tmp for one."""
    return [f"/packages/{number}" for number in range(len(packages))]


def build(sources: dict[str, int], links: dict[str, str], disk_bytes: int) -> None:
    """Make the tree in a fresh mount namespace and move into it.

    Args:
        sources: as `open_sources` gives them.
        links: symbolic links of the host's root that the interpreter's libraries need, such as `/lib` to `usr/lib`.
        disk_bytes: size of the scratch folder.
    """
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    base = "/tmp"  # any folder that exists on every host; what lies in it is hidden, not touched
    syscalls.mount("gymroot", base, "tmpfs", syscalls.MS_NOSUID, "size=1m,mode=755")
    for path, target in links.items():
        os.symlink(target, base + path)
    for path, fd in sorted(sources.items()):
        if path not in links:
            _bind(fd, base + path)
    scratch = base + SCRATCH
    os.makedirs(scratch, exist_ok=True)
    syscalls.mount(
        "scratch",
        scratch,
        "tmpfs",
        syscalls.MS_NOSUID | syscalls.MS_NODEV,
        f"size={disk_bytes},nr_inodes=4096,mode=1777",
    )
    old = base + "/.old"
    os.mkdir(old)
    os.chdir(base)
    syscalls.pivot_root(".", ".old")
    os.chdir("/")
    syscalls.unmount("/.old")
    os.rmdir("/.old")
    syscalls.mount_setattr("/", _READ_ONLY, recursive=False)


def _bind(fd: int, target: str) -> None:
    source = f"/proc/self/fd/{fd}"
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    syscalls.mount(source, target, "", syscalls.MS_BIND | syscalls.MS_REC)
    device = target.rpartition("/")[0].endswith("/dev")
    attributes = syscalls.MOUNT_ATTR_NOSUID if device else _READ_ONLY | syscalls.MOUNT_ATTR_NODEV
    syscalls.mount_setattr(target, attributes, recursive=True)


def host_links(*, tools: bool) -> dict[str, str]:
    """The host's top-level links into /usr, as merged-usr systems have them."""
    paths = ("/lib", "/lib64", "/bin", "/sbin") if tools else ("/lib", "/lib64")
    return {path: os.readlink(path) for path in paths if os.path.islink(path)}


def clean_scratch(folder: str, kept: frozenset[str] | set[str] = frozenset(), *, owned: bool) -> bool:
    """Empty the scratch folder, what is `kept` aside; False where something resists: it must not be used again.

    `owned`: the folder itself is the program's user's, who may have closed it or written on it.
    """
    try:
        if owned:
            _restore(folder)
        entries = os.listdir(folder)
        if not kept.issuperset(entries):
            _empty(folder, kept)
            entries = os.listdir(folder)
        return kept.issuperset(entries)
    except OSError:
        return False


def _restore(folder: str) -> None:
    os.chmod(folder, 0o1777)
    for name in os.listxattr(folder):
        os.removexattr(folder, name)
    os.utime(folder, (0, 0))


def _empty(path: str, kept: frozenset[str] | set[str]) -> None:
    """Remove everything in a folder, never following a link; however deep it is, three descriptors are enough."""
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while names := [name for name in os.listdir(top) if name not in kept]:
            for name in names:
                if not _unlinked(name, top):
                    _flatten(name, top)
                    os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def _flatten(name: str, top: int) -> None:
    """Empty one folder: its files go, its folders move up, to be emptied in their turn."""
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for inner in os.listdir(folder):
            if not _unlinked(inner, folder):
                os.rename(inner, os.urandom(12).hex(), src_dir_fd=folder, dst_dir_fd=top)
    finally:
        os.close(folder)


def _unlinked(name: str, folder: int) -> bool:
    try:
        os.unlink(name, dir_fd=folder)
    except (IsADirectoryError, PermissionError):
        return False
    return True
