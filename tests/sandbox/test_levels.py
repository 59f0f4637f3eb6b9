"""The ladder of mechanisms on this kernel: what each kind of process gets, what holds there, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sandbox.confined import CONTAINER_CAPABILITIES

from gym_bus.config import Config
from gym_bus.errors import SandboxRefused
from gym_bus.sandbox import advice, landlock, seccomp
from gym_bus.sandbox.owner import Zygote
from gym_bus.sandbox.protections import NAMES, SHARED, USER, Level
from gym_bus.settings import VerifierConfig
from gym_bus.verifiers.base import demanded_level
from gym_bus.verifiers.code_gen import CodeGen
from gym_bus.workers.local import LocalStack

HERE = Path(__file__).resolve().parent
ROOT = os.geteuid() == 0
NOBODY = 65534
USER_ALLOWED: dict[str, Any] = {"user": NOBODY}
USER_REFUSED: dict[str, Any] = {"user": NOBODY, "refuse": ["namespaces"]}
CONTAINER_ROOT: dict[str, Any] = {"capabilities": sorted(CONTAINER_CAPABILITIES), "refuse": ["namespaces"]}
BARE_ROOT: dict[str, Any] = {"capabilities": [], "refuse": ["namespaces"]}
NOTHING: dict[str, Any] = {"user": NOBODY, "refuse": ["namespaces", "landlock"]}
SWITCHED_OFF: dict[str, Any] = {"user": NOBODY, "sysctl": True}

pytestmark = pytest.mark.timeout(300)  # three examinations at once
needs_landlock = pytest.mark.skipif(landlock.version() < landlock.SCOPES, reason="no Landlock of version 6 here")


def start(options: dict[str, Any], *command: str) -> subprocess.Popen[str]:
    own = options if ROOT else options | {"user": None}
    return subprocess.Popen(
        [sys.executable, str(HERE / "confined.py"), json.dumps(own), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def gym_bus(options: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
    return finish(start(options, sys.executable, "-m", "gym_bus.cli.main", *arguments))


RUNGS = {
    "user": (USER_ALLOWED, Level.NAMESPACES, {USER}),
    "user without namespaces": (USER_REFUSED, Level.LANDLOCK, {USER, NAMES, SHARED}),
    "root of a container": (CONTAINER_ROOT, Level.LANDLOCK, {NAMES, SHARED}),
}


@pytest.fixture(scope="module")
def climbers() -> dict[str, subprocess.Popen[str]]:
    """One process on each rung, all at once."""
    started = {name: options for name, (options, _, _) in RUNGS.items() if ROOT or "capabilities" not in options}
    return {name: start(options, sys.executable, str(HERE / "rung.py")) for name, options in started.items()}


@needs_landlock
@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_runs_honest_programs_holds_what_it_promises_and_names_what_it_does_not(
    climbers: dict[str, subprocess.Popen[str]], rung: str
) -> None:
    if rung not in climbers:
        pytest.skip("only root can be root with less")
    _, level, absent = RUNGS[rung]

    code, out, err = finish(climbers[rung])

    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    apart = level is Level.NAMESPACES
    assert (report["level"], set(report["absent"])) == (level, absent)
    assert bool(report["lowered"]) is not apart
    assert report["not held"] == []
    assert report["not protected"] == ([] if apart else ["ask which files the host has"])
    assert report["held"] > 90
    assert report["memory"] == "memory"
    assert (report["laid"], report["cases"]) == ("A ['b']\n", ["1\n", "2\n"])
    assert report["pair"] == ["b'that'\n", "b'what?'\n"]
    assert report["session"] == ["", "21"]
    assert report["numeric"] == "10\n"
    assert report["judged"][:2] == [1.0, 1.0]
    assert report["left"] == []
    # A verifier's own demand is a floor that the worker's setting does not lower.
    demanded, started = report["judged"][2], report["started"]
    assert started["mcqa"] == ""
    assert started["code_gen"].startswith(f"sandbox level {level}: protects ")
    assert all(f"{name} (" in started["code_gen"].partition("; does not protect ")[2] for name in absent)
    if apart:
        assert (demanded, started["demanding"]) == (1.0, started["code_gen"])
    else:
        assert demanded.startswith("Demanding demands level namespaces, this machine gives landlock: ")
        assert started["demanding"].startswith("refused: the sandbox cannot start: unshare: Operation not permitted")


@pytest.mark.parametrize(
    ("options", "arguments", "says"),
    [
        (SWITCHED_OFF, ["sandbox", "doctor", "--quick"], "sysctl -w user.max_user_namespaces=15000"),
        (USER_REFUSED, ["sandbox", "doctor"], "docker run --security-opt seccomp=unconfined"),
        (USER_REFUSED, ["worker", "verifier", "--nats", "nats://127.0.0.1:1"], "verifier.sandbox_level=landlock"),
        (NOTHING, ["sandbox", "doctor", "--least", "landlock"], "must allow landlock_create_ruleset"),
        pytest.param(
            BARE_ROOT,
            ["sandbox", "doctor", "--least", "landlock"],
            "programs would run as the machine's root: no other user is to be had; for level landlock: run it as "
            "another user (docker run --user 1000:1000), or root with --cap-add CHOWN",
            marks=pytest.mark.skipif(not ROOT, reason="only root can be root with less"),
        ),
    ],
    ids=["switched off", "doctor in a container", "worker in a container", "nothing at all", "root without rights"],
)
def test_what_does_not_get_its_level_does_not_start_and_says_what_would_mend_it(
    options: dict[str, Any], arguments: list[str], says: str
) -> None:
    code, out, err = gym_bus(options, *arguments)

    assert (code, out) == (2, "")
    assert err.startswith("error: the sandbox cannot start: unshare: ")
    assert "for level namespaces: " in err
    assert says in err


def test_a_job_that_runs_programs_is_refused_before_anything_starts_and_another_needs_no_sandbox(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    tmp_path.chmod(0o777)
    folder.chmod(0o777)

    code, out, err = gym_bus(
        {"refuse": ["namespaces"]}, "eval", "run", "humaneval", "--split", "example", "--model", "simulated",
        "--output", str(folder),
    )  # fmt: skip

    assert (code, out) == (2, "")
    assert "error: the sandbox cannot start: unshare: " in err
    assert not (folder / "logs").exists()
    assert LocalStack(Config(), folder, verifier="mcqa").config.verifier.names == ("mcqa",)
    assert LocalStack(Config(verifier=VerifierConfig(names=("a",))), folder, verifier="b").config.verifier.names == (
        "a",
    )


@pytest.mark.skipif(not ROOT, reason="only root gives programs another user")
async def test_root_whose_interpreter_others_cannot_read_is_told_which_folder_is_closed() -> None:
    closed = advice._closed_folder(Path(sys.base_prefix))
    if closed is None:
        pytest.skip("every user can read this interpreter")

    with pytest.raises(SandboxRefused, match=f"another user cannot read .*for level landlock: chmod o\\+rx {closed}"):
        await Zygote("", level=Level.LANDLOCK).start()


class Demanding(CodeGen):
    sandbox_level = Level.NAMESPACES


@pytest.mark.parametrize(
    ("verifier", "setting", "level"),
    [
        (CodeGen, "namespaces", Level.NAMESPACES),
        (CodeGen, "landlock", Level.LANDLOCK),
        (Demanding, "landlock", Level.NAMESPACES),
        (Demanding(), "landlock", Level.NAMESPACES),
    ],
)
def test_a_verifier_can_demand_more_than_its_worker_and_not_less(verifier: Any, setting: str, level: Level) -> None:
    assert demanded_level(verifier, setting) is level


def machine(root: Path, **files: str) -> Path:
    """A file tree with kernel settings."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"proc__sys__user__max_user_namespaces": "0"}, "sysctl -w user.max_user_namespaces=15000"),
        ({"proc__sys__user__max_net_namespaces": "0"}, "sysctl -w user.max_net_namespaces=15000"),
        (
            {"proc__sys__kernel__unprivileged_userns_clone": "0", "proc__self__status": "Seccomp:\t0"},
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        (
            {"proc__sys__kernel__apparmor_restrict_unprivileged_userns": "1"},
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (
            {"proc__self__status": "Name:\tx\nSeccomp:\t2", "proc__sys__user__max_user_namespaces": "0"},
            "sysctl -w user.max_user_namespaces=15000; and start it without what confines it: docker run "
            "--security-opt seccomp=unconfined (Kubernetes: securityContext.seccompProfile.type: Unconfined;",
        ),
        (
            {"proc__self__status": "Seccomp:\t2", "proc__self__attr__current": "docker-default (enforce)"},
            "start it without what confines it: docker run --security-opt seccomp=unconfined --security-opt "
            "apparmor=unconfined (Kubernetes: securityContext.seccompProfile.type: Unconfined, securityContext.app",
        ),
        ({"proc__self__attr__current": "unconfined"}, "the kernel must have user namespaces"),
        ({"proc__sys__user__max_user_namespaces": "96365"}, "the kernel must have user namespaces"),
        ({"proc__sys__user__max_time_namespaces": "0"}, "the kernel must have user namespaces"),
    ],
)
def test_the_advice_names_the_setting_that_is_in_the_way(tmp_path: Path, files: dict[str, str], says: str) -> None:
    assert advice.to_get(Level.NAMESPACES, machine(tmp_path, **files)).startswith(f"for level namespaces: {says}")


@pytest.mark.parametrize(
    ("version", "refusal", "says"),
    [
        (0, errno.EOPNOTSUPP, "boot the kernel with lsm=landlock,yama,apparmor"),
        (0, errno.ENOSYS, "Linux 5.13"),
        (0, errno.EPERM, "the container's filter must allow landlock_create_ruleset"),
        (5, 0, "programs another user: run as root with --cap-add CHOWN --cap-add KILL"),
    ],
)
def test_the_advice_says_why_there_is_no_landlock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int, refusal: int, says: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(landlock, "version", lambda: version)
    monkeypatch.setattr(landlock, "refusal", lambda: refusal)
    root = machine(tmp_path, sys__kernel__security__lsm="yama,apparmor", proc__self__status=f"CapEff:\t{0xC0:016x}")

    assert says in advice.to_get(Level.LANDLOCK, root)


def test_the_filter_of_one_process_is_smaller_than_the_kernel_takes() -> None:
    for code in (seccomp.build(forks=True), seccomp.build(forks=False, apart=False), seccomp.one_process()):
        assert 0 < len(code) // 8 < 4096 and len(code) % 8 == 0
