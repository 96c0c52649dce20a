"""What a policy is shown of the observations."""

import torch

from quire.engine.observe import Observations
from quire.engine.pruning import _observed
from quire.kernels.paged_rows import PagedRows
from quire.pruning.policy import Needs


def test_what_no_repetition_could_look_at_counts_as_read() -> None:
    seen = Observations(Needs(repeat=True), window=2, sinks=1, first=0)
    seen.unread = 6
    seen.repeated[0] = torch.tensor(
        [[0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 0.0, 0.0], [0.5, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    )
    # One head kept four of six entries, the other two; three came since.
    positions = torch.tensor([[0, 1, 3, 5, 6, 7, 8], [0, 4, 6, 7, 8, 0, 0]])
    shown = _observed(seen, 0, 0, PagedRows.of(positions.int()), num_tokens=9)["repeated"]
    assert shown[0].tolist() == torch.tensor([0.1, 0.2, 0.3, 0.4, 1, 1, 1]).tolist()
    assert shown[1, :5].tolist() == torch.tensor([0.5, 0.6, 1, 1, 1]).tolist()
