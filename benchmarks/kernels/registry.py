"""The ops that are measured, in the order of their importance: a run that is cut short has measured the first ones."""

from spade_t5.benchmarks.kernels import (
    gated_gelu,
    linear_cross_entropy,
    local_attention,
    rms_norm,
    ssm_conv,
    ssm_kernel,
)
from spade_t5.benchmarks.kernels.cases import Benchmark, Plan, Workload

OPS: dict[str, Benchmark] = {
    "local_attention": local_attention.BENCHMARK,
    "ssm_conv": ssm_conv.BENCHMARK,
    "rms_norm": rms_norm.BENCHMARK,
    "gated_gelu": gated_gelu.BENCHMARK,
    "linear_cross_entropy": linear_cross_entropy.BENCHMARK,
    "ssm_kernel": ssm_kernel.BENCHMARK,
}


def build_workload(plan: Plan, op: str, case_name: str, contender: str) -> Workload:
    """Make one workload from names, as another process needs it."""
    (case,) = (case for case in OPS[op].cases(plan) if case.name == case_name)
    return case.contenders[contender]()
