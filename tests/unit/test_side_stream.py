import pytest
import torch

from dsv3.model.side_stream import SideStream


@pytest.mark.parametrize("beside", [False, True])
def test_without_cuda_work_runs_immediately(beside: bool) -> None:
    done = []

    def work() -> torch.Tensor:
        done.append(1)
        return torch.ones(2)

    wait = SideStream(torch.device("cpu")).start(work, beside)
    assert done == [1]
    assert wait().tolist() == [1.0, 1.0] and done == [1]


@pytest.mark.gpu
def test_a_cuda_graph_captures_the_side_stream() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    side, x = SideStream(device), torch.zeros(1 << 20, device=device)

    def step() -> torch.Tensor:
        wait = side.start(lambda: (x + 1) * 2)
        return (x - 1) + wait()

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for value in range(5):
        x.fill_(value)
        graph.replay()
        assert torch.equal(y, torch.full_like(y, 3 * value + 1))
