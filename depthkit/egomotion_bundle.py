"""The ego-motion network of a video run, in a folder of the form of a bundle beside that of the depth model."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from depthkit.bundle import FACTS, FORMAT, WEIGHTS, BundleError, load_strict, sha256, write_folder
from depthkit.config import ConfigError, EgomotionConfig
from depthkit.models.egomotion import EgomotionNet


def save_egomotion(folder: Path, network: EgomotionNet, config: EgomotionConfig) -> Path:
    """Write weights and settings as a whole. Translations are in the unit of the depth model of the same run."""
    with write_folder(folder) as temporary:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        facts = {"format": FORMAT, "content": "egomotion", "num_frames": network.num_frames}
        facts["egomotion"] = asdict(config)
        facts["sha256"] = sha256(temporary / WEIGHTS)
        (temporary / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def load_egomotion_weights(network: EgomotionNet, folder: Path) -> None:
    """Fill `network` with the weights in `folder`; BundleError lists what does not fit."""
    load_strict(network, load_egomotion(folder).state_dict(), folder)


def load_egomotion(folder: Path) -> EgomotionNet:
    """The network of `save_egomotion`, in eval mode on the CPU; BundleError names what is wrong with the folder."""
    try:
        facts = json.loads((folder / FACTS).read_text())
        if facts.get("content") != "egomotion":
            raise BundleError(f"{folder} holds no ego-motion network; stage=video writes one beside its bundle")
        network = EgomotionNet(EgomotionConfig(**facts["egomotion"]), facts["num_frames"])
        found = sha256(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: {error.filename} is missing") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, ConfigError) as error:
        raise BundleError(f"{folder / FACTS}: {error}") from error
    if found != facts["sha256"]:
        raise BundleError(
            f"{folder / WEIGHTS}: sha256 is {found}, {FACTS} says {facts['sha256']}; copy the folder again"
        )
    load_strict(network, load_file(folder / WEIGHTS), folder)
    return network.eval()
