"""TRL: the guide's teacher has the average of the trained model."""

import pytest
import torch

from tests.support.frameworks import on
from tests.support.guide import added_lines, run_section

pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks' own making; ranks are children


def taught():
    """Whether the teacher of the guide's program has the average, and other weights than the trained model."""
    names = run_section("TRL")
    trainer, teacher = names["trainer"], names["teacher"]
    trained = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    with trainer.averaged_parameters():
        averaged = dict(trainer.model.named_parameters())
        is_average = all(torch.equal(param, averaged[name]) for name, param in teacher.named_parameters())
    return is_average, any(not torch.equal(param, trained[name]) for name, param in teacher.named_parameters())


@pytest.mark.parametrize("ranks", [0, 2])
def test_the_guide(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(added_lines("TRL")) == 4
    assert on(ranks, taught) == (True, True)
