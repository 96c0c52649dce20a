"""The policy that docs/pruning.md adds, and the test that it comes with: run, so that the guide stays true."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quire.pruning import table

from . import test_policies

GUIDE = Path(__file__).parents[2] / "docs" / "pruning.md"


def test_the_guides_policy_passes_the_guides_test_and_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, test = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    module = ModuleType("quire.pruning.vatp")
    module.__package__ = "quire.pruning"
    exec(policy, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(test_policies).copy()
    exec(test, names)
    names["test_vatp"]()
    monkeypatch.setitem(table.POLICIES, "vatp", module.VatpPolicy)
    test_policies.test_padding_is_never_read("vatp")
    test_policies.test_heads_may_come_in_any_order("vatp")
    test_policies.test_bfloat16_cache("vatp")
