"""The bus against a containerised nats-server, as testcontainers runs one."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator

import pytest

from gym_bus import subjects
from gym_bus.bus import Bus
from gym_bus.messages import Request, RolloutId
from gym_bus.server import find_binary
from gym_bus.settings import BusConfig

pytestmark = pytest.mark.containers

IMAGE = "gym-bus-nats:test"


def _docker() -> str:
    """The Docker command, where an engine answers it."""
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("no docker command")
    asked = subprocess.run([docker, "info"], capture_output=True, text=True, timeout=60, check=False)
    if asked.returncode != 0:
        pytest.skip(f"no Docker engine: {(asked.stderr or asked.stdout).strip().splitlines()[-1]}")
    return docker


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in a container, made from the wheel's static binary: nothing is pulled."""
    docker = _docker()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(find_binary(), "nats-server")
    changes = ['ENTRYPOINT ["/nats-server"]', 'CMD ["-js"]', "EXPOSE 4222 8222"]
    command = [docker, "import", *(part for change in changes for part in ("-c", change)), "-", IMAGE]
    subprocess.run(command, input=packed.getvalue(), check=True, capture_output=True, timeout=100)
    # Read when the module is imported: no helper container can be pulled here, and the host's ports are ours.
    os.environ.update(
        TESTCONTAINERS_RYUK_DISABLED="true", TESTCONTAINERS_CONNECTION_MODE="docker_host", TC_POOLING_INTERVAL="0.05"
    )
    from testcontainers.community.nats import NatsContainer

    with NatsContainer(IMAGE, jetstream=True) as container:
        yield container.nats_uri()


async def test_streams_are_created_and_messages_flow(url: str) -> None:
    async with await Bus.connect(BusConfig(url=url)) as bus:
        names = await bus.init()
        assert subjects.REQUESTS in names
        request = Request(rollout=RolloutId("job", 0, 0), agent="simple", model="m", verifier="math", row=b"{}")
        assert await bus.publish(request, "job.0.0#1") is True
        assert await bus.publish(request, "job.0.0#1") is False
        assert await bus.streams.waiting(subjects.REQUESTS, subjects.requests_of("job")) == 1
