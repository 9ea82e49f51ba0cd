"""Steps of real ranks on hosts whose links are made slow, beside what the scaling model says of them.

The hosts are network namespaces of this machine (`spade_t5.testing.hosts`), so that the links are the kernel's own TCP. A link is judged by
all-reduces of two hosts; from its latency and bandwidth follow the steps on two hosts, on two of two ranks each, and on four.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spade_t5.benchmarks import scaling_rank
from spade_t5.testing.hosts import INTERFACE, HostProcess, Hosts, make_hosts
from spade_t5.training.bandwidth import CollectiveTime
from spade_t5.training.communication import describe
from spade_t5.training.scaling import Links, Network, StepTime, fit_links, predict_step

ZERO_STAGES = (0, 1, 2, 3)
_PORT = 29400


class Shape(NamedTuple):
    """What is done to the links."""

    megabits_per_second: float | None
    """What a host can receive; None: no limit."""
    delay_milliseconds: float = 0
    """How much longer a packet is on its way."""

    @contextlib.contextmanager
    def applied(self, hosts: Hosts) -> Iterator[None]:
        """Context in which the links are so."""
        rate = None if self.megabits_per_second is None else self.megabits_per_second * 1e6 / 8
        with hosts.slowed(bytes_per_second=rate, delay_seconds=self.delay_milliseconds / 1000):
            yield


class Layout(NamedTuple):
    """Where ranks run."""

    num_hosts: int
    """Hosts."""
    host_ranks: int
    """Ranks of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A step on shaped links, measured and predicted."""

    layout: Layout
    """Where the ranks ran."""
    shape: Shape
    """What was done to the links."""
    zero_stage: int
    """Of the run."""
    measured_seconds: float
    """Median time of a step."""
    predicted: StepTime
    """From the latency and bandwidth of the link between two hosts."""

    links: Links
    """That latency and bandwidth, as measured."""

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted.seconds / self.measured_seconds

    @property
    def communication_share(self) -> float:
        """What of the predicted step is communication."""
        return 1 - self.predicted.efficiency


class Ranks:
    """Ranks on hosts, which carry out one thing after the other; as a context it leaves none running."""

    def __init__(self, hosts: Hosts, layout: Layout, folder: Path) -> None:
        """Starts them; `folder` is for their runs."""
        self.layout, self._hosts, self._folder = layout, hosts, folder
        self._runs = 0
        self._processes: list[HostProcess] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        for rank in range(layout.num_hosts * layout.host_ranks):
            host = hosts[rank // layout.host_ranks]
            variables = {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank % layout.host_ranks)},
                **{"WORLD_SIZE": str(layout.num_hosts * layout.host_ranks), "LOCAL_WORLD_SIZE": str(layout.host_ranks)},
                **{"MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(_PORT), "GLOO_SOCKET_IFNAME": INTERFACE},
                **{"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            }
            command = [sys.executable, "-m", "spade_t5.benchmarks.scaling_rank"]
            self._processes.append(
                host.popen(command, env=variables, stdin=-1, stdout=-1, stderr=self._errors, text=True)
            )

    def __enter__(self) -> "Ranks":
        """Waits until all have met."""
        self._answers()
        return self

    def __exit__(self, *details: object) -> None:
        """Kills what is left."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait(10)
        self._errors.close()

    def collectives(self) -> list[CollectiveTime]:
        """Times of the collectives that training uses, by size."""
        num_ranks = self.layout.num_hosts * self.layout.host_ranks
        return [
            CollectiveTime(name=name, backend="gloo", num_ranks=num_ranks, num_bytes=nbytes, seconds=seconds)
            for name, nbytes, seconds in self._ask("collectives")
        ]

    def step_seconds(self, zero_stage: int) -> float:
        """Median time of a step."""
        self._runs += 1
        return self._ask({"zero_stage": zero_stage, "run_dir": str(self._folder / f"run-{self._runs}")})

    def _ask(self, request: Any) -> Any:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return self._answers()[0]

    def _answers(self) -> list[Any]:
        return [self._answer(process) for process in self._processes]

    def _answer(self, process: HostProcess) -> Any:
        assert process.stdout is not None
        while line := process.stdout.readline():
            with contextlib.suppress(json.JSONDecodeError):  # libraries print too
                return json.loads(line)
        self._errors.seek(0)
        raise RuntimeError(f"a rank ended: {self._errors.read().decode(errors='replace')[-2000:]}")


def compare(
    layouts: Sequence[Layout], shapes: Sequence[Shape], zero_stages: Sequence[int] = ZERO_STAGES
) -> Iterator[Comparison]:
    """Measures steps and predicts them.

    What a step computes is what one takes on links as they are, less what the model says of its communication there. For each shape the link
    between two hosts is judged by all-reduces of the first layout, which must have one rank on each of two hosts.

    Args:
        layouts: where ranks run.
        shapes: of the links; a delay is tried in the first layout alone, since the one process that delays packets keeps up with two hosts only.
        zero_stages: of the runs.
    """
    links: dict[Shape | None, Links] = {}
    model = describe(scaling_rank.small_model())
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate(layouts):
            world_size = layout.num_hosts * layout.host_ranks
            own = Path(folder) / str(number)
            own.mkdir()
            with make_hosts(own, layout.num_hosts) as hosts, Ranks(hosts, layout, own) as ranks:

                def judged(shape: Shape | None, ranks: Ranks = ranks, is_first: bool = number == 0) -> Links:
                    if is_first:
                        links[shape] = fit_links(ranks.collectives())
                    return links[shape]

                def predicted(
                    zero_stage: int,
                    between: Links,
                    compute_seconds: float,
                    layout: Layout = layout,
                    world_size: int = world_size,
                ) -> StepTime:
                    config = scaling_rank.settings(zero_stage, world_size)
                    assert config.deepspeed is not None
                    network = Network(node_ranks=layout.host_ranks, within=links[None], between=between, is_gpu=False)
                    return predict_step(
                        model, config, config.deepspeed, network, world_size=world_size, compute_seconds=compute_seconds
                    )

                unshaped = judged(None)
                compute = {}
                for zero_stage in zero_stages:
                    seconds = ranks.step_seconds(zero_stage)
                    compute[zero_stage] = max(seconds - predicted(zero_stage, unshaped, 0.0).seconds, 0.0)
                for shape in shapes if number == 0 else [shape for shape in shapes if not shape.delay_milliseconds]:
                    with shape.applied(hosts):
                        measured = {zero_stage: ranks.step_seconds(zero_stage) for zero_stage in zero_stages}
                        between = judged(shape)  # last, when TCP has got used to the link
                    for zero_stage, seconds in measured.items():
                        yield Comparison(
                            layout=layout,
                            shape=shape,
                            zero_stage=zero_stage,
                            measured_seconds=seconds,
                            predicted=predicted(zero_stage, between, compute[zero_stage]),
                            links=between,
                        )
