"""`spade-t5 launch hostfile ... -- doctor` on two hosts that share no temporary folder."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spade_t5.testing import documented
from spade_t5.testing.hosts import Hosts, hosts_or_skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts_or_skip(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def test_a_launched_doctor_tells_what_a_launched_run_would_meet(
    hosts: Hosts, tmp_path: Path, pretrain_words: Callable[..., list[str]]
) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    _, *run_words = pretrain_words(Path("/run/tmp/run"))  # of which each host has its own
    command = [sys.executable, "-m", "spade_t5.launch", "launch", "hostfile", "--hostfile", str(hostfile)]
    done = hosts[0].run(
        [*command, "--", "doctor", *run_words, "--json"], env={"OMP_NUM_THREADS": "1"}, timeout_seconds=240
    )
    assert done.returncode == 1, done.stderr
    output = json.loads(done.stdout)
    assert [node["node"] for node in output["nodes"]] == ["host1", "host2"]
    (finding,) = output["findings"]
    assert (finding["node"], finding["check"]) == ("host2", "run folder")
    documented(f"{finding['node']}: {finding['check']}: {finding['value']}; {finding['remedy']}")
    assert output["collectives"]
    assert "spade-t5 launch" not in done.stderr  # what was found is no fault of the ranks
    for host in hosts:
        host.assert_idle()
        left = host.run(["ls", "/run/tmp"]).stdout.split()
        assert not [name for name in left if name == "run" or name.startswith("launch-")]
