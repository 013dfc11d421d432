"""Pictures, then text, then the model: each is loaded by ComfyUI when it is needed, and room is made for the next."""

import comfy.model_management as mm
import pytest
import queueing

pytestmark = pytest.mark.comfy


@pytest.fixture
def loads(monkeypatch):
    """What ComfyUI was asked to load, and with how much room beside it, in order."""
    asked = []
    load = mm.load_models_gpu

    def noted(models, memory_required=0, **more):
        asked.append(([model.model for model in models], memory_required))
        return load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(mm, "load_models_gpu", noted)
    return asked


def test_the_encoders_are_done_before_the_model_comes_and_do_not_come_back(tmp_path, monkeypatch, loads):
    trainer = queueing.trainer("sdxl", tmp_path, monkeypatch, models=queueing.shared_models("sdxl"))
    names = {
        id(trainer.model.model): "model",
        id(trainer.clip.patcher.model): "text",
        id(trainer.vae.patcher.model): "pictures",
    }
    loaded_while_training = []
    monkeypatch.setattr(
        queueing.hosttoys.LoadedModel,
        "prepare",
        _noting(queueing.hosttoys.LoadedModel.prepare, lambda: loaded_while_training.append(len(loads))),
    )
    trainer.queue(steps=1, save_every=1)
    order = [(names[id(model)], room) for models, room in loads for model in models]
    before, after = order[: loaded_while_training[0]], order[loaded_while_training[0] :]
    encoding = [name for name, _ in before if name != "text"]
    assert encoding and set(encoding) == {"pictures"}, "the model was loaded before all pictures were encoded"
    assert [name for name, _ in before].index("pictures") < len(before) - 1 and before[-1][0] == "text"
    assert "text" not in {name for name, _ in after}, "the text encoders came back"
    assert after[0][0] == "model" and after[0][1] > 0, "no room was asked for beside the model"


def _noting(method, note):
    def noted(self, *args, **kwargs):
        note()
        return method(self, *args, **kwargs)

    return noted
