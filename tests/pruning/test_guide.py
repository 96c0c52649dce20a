"""The guide's policy is run as it stands in docs/pruning.md."""

import re
from pathlib import Path
from typing import Any

import pytest

from quire.core.pruning import PruneParams
from quire.pruning import attention, policy, table
from quire.pruning.select import select

from .test_policies import observed_view

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "pruning.md"


def test_the_guides_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    source, test = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    module: dict[str, Any] = {"__package__": "quire.pruning", "__name__": "quire.pruning.vatp"}
    exec(compile(source, "vatp.py", "exec"), module)
    view = observed_view([30, 21], num_tokens=40)
    names = module | vars(policy) | vars(attention) | {"pytest": pytest}
    exec(compile(test, "test_vatp.py", "exec"), names)
    names["test_vatp"](view)
    monkeypatch.setitem(table.POLICIES, "vatp", module["VatpPolicy"])
    monkeypatch.setitem(table._INFOS, "vatp", table.PolicyInfo())
    params = PruneParams(policy="vatp", budget="ada", refine=("chunk",), sinks=2, window=6)
    assert select(table.make_policy(params), [view], params, 12).counts.sum() == 24


def test_the_guide_lists_every_policy() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", GUIDE.read_text(), re.MULTILINE)
    assert set(rows) >= set(table.policy_infos())
