"""What was measured before the first step is what micro-batches take."""

import pytest
import torch
from test_gpu_model import GEMMA, READERS, build, made_up

from common.batching import pack
from common.train.memory import measure
from common.train.optim import GradientSum, soft_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("longest", [700, 3000])
def test_the_measured_line_is_the_peak_of_real_micro_batches(longest, monkeypatch):
    sizes = GEMMA.to_dict() | {"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 4096}
    monkeypatch.setitem(READERS, "deep", (type(GEMMA).from_dict(sizes), READERS["gemma"][1]))
    model, device = build("deep"), torch.device("cuda")
    sums = GradientSum(model, accumulation="fp32", is_replica=True)
    memory = measure(model, longest=longest, device=device)
    assert all(not total.any() for total in sums.sums.values()), "measuring leaves no gradient"
    for tokens, layers in ((4000, 0), (9000, 0), (9000, 8), (9000, 3)):
        lengths = [longest, *[250] * ((tokens - longest) // 250)]
        packed = pack(made_up(lengths, GEMMA.vocab_size), labels=[[1, 0, 0]] * len(lengths)).to(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        soft_cross_entropy(model(packed, recompute=layers), packed.labels_SC).sum().backward()
        found = torch.cuda.max_memory_allocated() - before
        assert found == pytest.approx(memory.peak(sum(lengths), layers), rel=0.1), (tokens, layers)
