"""Checkpoints of other trainers, written by the real libraries: `python -m tests.support.trainers FOLDER CONTENT`.

CONTENT is a file with the state that each of them holds: `model`, `model_ema`, `optimizer` and `step`, as the original
training saves them. The libraries are in a folder of their own, which PYTHONPATH names.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from pixart.model.dit import DiT
from tests.support.checkpoints import CONFIG

BUFFERS = ("time_proj.freqs", "pos_embed.div_term")


def model_of(state: dict[str, Any]) -> DiT:
    model = DiT(**CONFIG)
    model.load_state_dict(state)
    return model


def optimizer_of(model: torch.nn.Module, content: dict[str, Any]) -> torch.optim.AdamW:
    """Return AdamW over the parameters in one group, with the moments of the content."""
    from pixart.model.dit import parameter_groups

    decayed, undecayed = parameter_groups(DiT(**CONFIG))
    by_name = dict(zip(decayed + undecayed, content["optimizer"]["state"].values(), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    state = {index: by_name[name] for index, (name, _) in enumerate(model.named_parameters())}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return optimizer


def write_accelerate(folder: Path, content: dict[str, Any]) -> None:
    """Write what `save_state` writes, with an EMA that is registered, as safetensors, as .bin and in several files."""
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

    for name, options in {
        "accelerate": {},
        "accelerate_bin": {"safe_serialization": False},
    }.items():
        accelerator = Accelerator(cpu=True)
        model = model_of(content["model"])
        average = EMAModel(model_of(content["model_ema"]).parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer := optimizer_of(model, content), lambda step: 1.0)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        accelerator.register_for_checkpointing(average)
        accelerator.save_state(str(folder / name), **options)
        accelerator.free_memory()
    Accelerator(cpu=True).save_model(
        model_of(content["model"]), str(folder / "accelerate_shards"), max_shard_size="40KB"
    )


def write_diffusers(folder: Path, content: dict[str, Any]) -> None:
    """Write what the training scripts of diffusers write: the model and its EMA in subfolders, beside the optimizer."""
    from diffusers.training_utils import EMAModel

    model = model_of(content["model"])
    average = EMAModel(model_of(content["model_ema"]).parameters(), model_cls=DiT, model_config=model.config)
    model.save_pretrained(folder / "diffusers/transformer")
    average.save_pretrained(f"{folder}/diffusers/transformer_ema")
    torch.save(optimizer_of(model, content).state_dict(), folder / "diffusers/optimizer.bin")
    model.save_pretrained(folder / "diffusers_shards", max_shard_size="40KB")
    torch.save(
        {"model": model.state_dict(), "ema": average.state_dict(), "optimizer": content["optimizer"]},
        folder / "diffusers_state.pt",
    )


def write_ema_pytorch(folder: Path, content: dict[str, Any]) -> None:
    from ema_pytorch import EMA

    average = EMA(model_of(content["model"]), ema_model=model_of(content["model_ema"]), beta=0.999)
    states = {"model": average.online_model.state_dict(), "ema": average.state_dict(), "step": content["step"]}
    torch.save({**states, "opt": content["optimizer"]}, folder / "ema_pytorch.pt")
    torch.save(average.state_dict(), folder / "ema_pytorch_alone.pt")


def write_lightning(folder: Path, content: dict[str, Any]) -> None:
    """Write a .ckpt of Lightning with hyperparameters of OmegaConf, and its EMAWeightAveraging."""
    import pytorch_lightning as lightning
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = model_of(content["model"])

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return sum(parameter.sum() for parameter in self.model.parameters()) * 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(dirpath=folder / "unused", save_top_k=0)],
    )
    trainer.fit(Module(OmegaConf.create({"lr": 1e-4, "nested": {"path": "/data"}})), DataLoader(torch.zeros(2, 1)))
    trainer.save_checkpoint(folder / "lightning.ckpt")


def main() -> None:
    folder, content = Path(sys.argv[1]), torch.load(sys.argv[2], weights_only=False)
    for write in (write_accelerate, write_diffusers, write_ema_pytorch, write_lightning):
        write(folder, content)


if __name__ == "__main__":
    main()
