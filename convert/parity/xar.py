"""Replay of xAR: the training pass with its inner outputs, and whole samplings from recorded noise."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ...core.errors import InvalidInput
from ...generators.xar import XAR, SeededNoise, time_index
from ...generators.xar_network import rms_norm
from .. import xar
from .recipe_weights import recipe_tensor
from .replay import LOSS, Replay, Tolerance

VELOCITY = Tolerance(atol=1e-5, rtol=1e-5)
INNER = Tolerance(atol=2e-5, rtol=1e-4)
GRADIENT = Tolerance(atol=1e-6, rtol=1e-4)
CELLS = Tolerance(atol=5e-5)
FULL_SIZE = Tolerance(atol=1e-3)
SAMPLERS = {"euler_maruyama_sampler": "sde", "euler_sampler": "ode"}
SAME_INNER = ("attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc2")  # modules of a block that are called so here and there
FACTORIES = {"xar_base": "xar-b", "xar_large": "xar-l", "xar_huge": "xar-h"}


class RecordedNoise(SeededNoise):
    """The starts [E, B, L, C] and step noise [E, S-1, B, L, C] that the official code drew."""

    def __init__(self, starts: Tensor, steps: Tensor | None):
        self.starts, self.steps = starts, steps

    def start(self, entity: int, shape: tuple[int, int]) -> Tensor:
        return self.starts[entity]

    def step(self, entity: int, step: int, shape: tuple[int, int]) -> Tensor:
        return self.steps[entity, step].double()


def replay_training(replay: Replay) -> None:
    """Kind training_loss: velocities, loss, gradients and inner outputs."""
    model = case_model(replay)
    labels = replay.input("in.labels")
    dropped = replay.input("in.label_drop_uniform") < model.config.label_drop_prob
    labels = torch.where(dropped, model.config.num_classes, labels)
    times = replay.input("in.time_normal").sigmoid()  # the cell is the slow index
    times_BE = times.view(model.num_units, -1).T
    replay.check("mid.time", times, VELOCITY)
    replay.check("mid.time_index", time_index(times))
    x_BTC = model.entities.to_sequence(replay.input("in.latents"))
    noise_BTC = rearrange(replay.input("in.noise"), "e b l c -> b (e l) c")
    with Taps(model) as taps:
        output, velocity_BTC = model.velocity_loss(x_BTC, labels, times_BE, noise_BTC)
    replay.check("mid.model_input", taps.model_input, VELOCITY)
    replay.check("out.velocity", velocity_BTC, VELOCITY)
    replay.check("out.loss", output.loss, LOSS)
    for name, value in taps.official().items():
        replay.check(f"mid.{name}", value, INNER)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for match in replay.matches(r"grad\.(.+)"):
        name, half = xar.place(match[1], model.config.encoder_depth)
        ours = gradients[name] if half is None else gradients[name].chunk(2)[half]
        replay.check(match[0], ours, GRADIENT)


def replay_sampling(replay: Replay, tolerance: Tolerance = CELLS) -> None:
    """Kind sampling: every network input and output, and the pictures' latents."""
    model = case_model(replay)
    labels, starts = replay.input("in.labels"), replay.input("in.latents")
    sampler = replay.case.setting("sampler", default="euler_maruyama_sampler")
    if sampler not in SAMPLERS:
        raise InvalidInput(f"{replay.case.folder}: unknown sampler {sampler!r}")
    steps, guidance = int(replay.case.setting("num_steps")), float(replay.case.setting("cfg"))
    settings = model.settings(steps, guidance, sampler=SAMPLERS[sampler])
    noise = RecordedNoise(starts, replay.input("in.eps") if SAMPLERS[sampler] == "sde" else None)
    inputs: list[Tensor] = []
    handle = model.transformer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][: len(labels)]))
    latents = model.generate_latents(labels, settings, [], noise=noise)
    handle.remove()
    del inputs[steps :: steps + 1]  # the clean run of a finished cell
    cells = rearrange(model.entities.to_sequence(latents), "b (e l) c -> e b l c", e=model.num_units)
    replay.check("out.cells", cells.double(), tolerance)
    replay.check("out.latent_map", latents, tolerance)
    x_ESBLC = torch.stack(inputs).unflatten(0, (model.num_units, steps))
    replay.check("mid.x", x_ESBLC, tolerance)
    times = torch.tensor([settings.times(entity)[:-1] for entity in range(model.num_units)])
    replay.check("mid.time_index", time_index(times))
    if replay.has("mid.v") or any(replay.matches(r"mid[.]call.+")):
        # From what was recorded, so that rounding in earlier steps does not count again.
        recorded_cells, recorded_x = replay.case.io.get("out.cells", cells), replay.case.io.get("mid.x", x_ESBLC)
        _replay_calls(replay, model, labels, recorded_cells.float(), recorded_x.float(), time_index(times))


def replay_full_size(replay: Replay) -> None:
    """Kind sampling_full_size: a released size, whose many terms add up to more rounding."""
    replay_sampling(replay, FULL_SIZE)


def case_model(replay: Replay) -> XAR:
    """The case's model, with its stored weights, or those that are drawn by recipe."""
    case, config = replay.case, replay.case.config
    factory = case.setting("factory", default="")
    if factory and factory not in FACTORIES:
        raise InvalidInput(f"{case.folder}: unknown factory {factory!r}")
    if (case.folder / "weights.safetensors").is_file():
        return xar.from_official(config, case.weights())
    from ...core.registry import constructor_arguments, find_entry

    if factory:
        arguments = constructor_arguments(find_entry(FACTORIES[factory]))
    else:
        arguments = xar.case_arguments(config)
    shapes = xar.official_shapes(arguments)
    seed = int(case.setting("weights_recipe_seed"))
    return xar.from_official(config, {name: recipe_tensor(name, shape, seed) for name, shape in shapes.items()})


def _replay_calls(
    replay: Replay, model: XAR, labels: Tensor, cells_EBLC: Tensor, x_ESBLC: Tensor, index_ES: Tensor
) -> None:
    """Velocities and inner outputs of each call of the official code, by one pass over the whole sequence, uncached.

    Both branches are computed, also where our sampler skips the unconditional one.
    """
    entities, steps = index_ES.shape
    labels_2B = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    velocities = []
    for call in range(entities * steps):
        entity, step = divmod(call, steps)
        sequence = torch.zeros(len(labels), model.entities.num_tokens, cells_EBLC.shape[-1])
        for earlier in range(entity):
            sequence[:, model.entities.tokens_of(earlier)] = cells_EBLC[earlier]
        tokens = model.entities.tokens_of(entity)
        sequence[:, tokens] = x_ESBLC[entity, step]
        index_2BE = torch.zeros(len(labels_2B), entities, dtype=torch.long)
        index_2BE[:, entity] = index_ES[entity, step]
        with torch.no_grad(), Taps(model) as taps:
            velocity = model.velocities(sequence.repeat(2, 1, 1), index_2BE, labels_2B)
        velocities.append(velocity[:, tokens])
        # The first call of a cell also runs the finished one before it.
        first = model.entities.tokens_of(entity - 1).start if entity and not step else tokens.start
        for match in replay.matches(rf"mid\.call{call}\.(.+)"):
            replay.check(match[0], taps.official()[match[1]][:, first : tokens.stop], INNER)
    replay.check("mid.v", torch.stack(velocities).unflatten(0, (entities, steps)), CELLS)


class Taps:
    """Collects, while it is open, what the official modules would have given in one pass over whole sequences."""

    def __init__(self, model: XAR):
        self.model, self.outputs, self.inputs = model, {}, {}

    def __enter__(self) -> Taps:
        network = self.model.transformer
        modules = {"z_proj": network.z_proj, "time": network.time_mlp, "decoder_embed": network.decoder_embed}
        modules["pred"] = network.pred
        for number, block in enumerate(network.blocks):
            below = {name: block.get_submodule(name) for name in (*SAME_INNER, "ada_lin", "mlp.fc1")}
            modules |= {f"{number}": block} | {f"{number}.{name}": module for name, module in below.items()}

        def keep(name: str):
            def hook(module, args, output) -> None:
                self.inputs[name], self.outputs[name] = args[0], output.detach()

            return hook

        self.handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def model_input(self) -> Tensor:
        return self.inputs["z_proj"]

    def official(self) -> dict[str, Tensor]:
        """Outputs by official module name."""
        network, first = self.model.transformer, self.model.config.encoder_depth
        outputs = self.outputs
        last = len(network.blocks) - 1
        named = {
            "time_embed": rearrange(outputs["time"], "b e d -> (e b) 1 1 d"),
            "z_proj": outputs["z_proj"],
            "z_proj_ln": rms_norm(outputs["z_proj"] + network.encoder_pos_embed, network.z_norm),
            "encoder_norm": rms_norm(outputs[str(first - 1)], network.encoder_norm),
            "decoder_embed": outputs["decoder_embed"],
            "decoder_norm": rms_norm(outputs[str(last)], network.decoder_norm),
            "pred": outputs["pred"],
        }
        for number in range(last + 1):
            stack = f"encoder_blocks.{number}" if number < first else f"decoder_blocks.{number - first}"
            named[stack] = outputs[str(number)]
            named |= {f"{stack}.{name}": outputs[f"{number}.{name}"] for name in SAME_INNER}
            gate, value = outputs[f"{number}.mlp.fc1"].chunk(2, dim=-1)
            named |= {f"{stack}.mlp.fc1_g": gate, f"{stack}.mlp.fc1_x": value}
            named[f"{stack}.norm1"] = rms_norm(self.inputs[str(number)])
            named[f"{stack}.ada_lin"] = rearrange(outputs[f"{number}.ada_lin"], "b e d -> (e b) d")
        return named
