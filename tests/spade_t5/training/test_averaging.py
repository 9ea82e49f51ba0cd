import torch

from spade_t5.training.averaging import WeightAverage
from spade_t5.training.optimizers import Fragment


def test_the_average_follows_its_formula_and_is_shared_by_fragments_of_one_tensor() -> None:
    flat, other = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), torch.nn.Parameter(torch.tensor([[4.0]]))
    fragments = [
        Fragment(name="a", offset=0, numel=1, param_numel=1, flat=flat, start=0),
        Fragment(name="b", offset=0, numel=2, param_numel=2, flat=flat, start=1),
        Fragment(name="c", offset=0, numel=1, param_numel=1, flat=other, start=0),
    ]
    average = WeightAverage(fragments, decay=0.75)
    expected, expected_other = flat.detach().clone(), other.detach().clone()
    for step in range(3):
        with torch.no_grad():
            flat.add_(step + 1)
            other.mul_(2)
        average.update()
        expected = 0.75 * expected + 0.25 * flat.detach()
        expected_other = 0.75 * expected_other + 0.25 * other.detach()
    assert average.flat(fragments[0]) is average.flat(fragments[1])
    torch.testing.assert_close(average.flat(fragments[1]), expected)
    torch.testing.assert_close(average.flat(fragments[2]), expected_other)
    assert not average.flat(fragments[0]).requires_grad
