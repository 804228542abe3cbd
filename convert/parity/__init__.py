"""Replay cases recorded from the official code: `python -m mediatok.convert.parity CASE_DIR [...]`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from ...core.errors import InvalidInput, MediatokError, nearest_names
from .case import find_cases, read_case
from .replay import Replay

# system, kind -> module of this package, function in it that takes a Replay
KINDS = {
    ("titok", "two_stage_vq"): ("titok", "replay_reconstruction"),
    ("titok", "single_stage_vq"): ("titok", "replay_reconstruction"),
    ("titok", "single_stage_vae"): ("titok", "replay_reconstruction"),
    ("titok", "tatitok_vq"): ("titok", "replay_reconstruction"),
    ("titok", "tatitok_vae"): ("titok", "replay_reconstruction"),
    ("titok", "stage1_train"): ("titok", "replay_stage1_train"),
    ("titok", "quantizer"): ("quantizer", "replay_quantizer"),
    ("titok", "quantizer_clustering"): ("quantizer", "replay_quantizer"),
    ("titok", "maskgit_vqgan"): ("maskgit_vqgan", "replay_maskgit_vqgan"),
    ("titok", "losses_stage2"): ("titok_training", "replay_losses"),
    ("titok", "losses_single_stage_vq"): ("titok_training", "replay_losses"),
    ("titok", "losses_single_stage_vae"): ("titok_training", "replay_losses"),
    ("titok", "training_utils"): ("titok_training", "replay_training_utils"),
    ("one_d_piece", "lengths"): ("one_d_piece", "replay_lengths"),
    ("one_d_piece", "stage1_train"): ("one_d_piece", "replay_stage1_train"),
    ("maskgit", "vit"): ("maskgit", "replay_network"),
    ("maskgit", "uvit"): ("maskgit", "replay_network"),
    ("maskgit", "vit_train"): ("maskgit", "replay_training"),
    ("maskgit", "uvit_train"): ("maskgit", "replay_training"),
    ("maskgit", "end_to_end"): ("maskgit", "replay_end_to_end"),
    ("xar", "training_loss"): ("xar", "replay_training"),
    ("xar", "sampling"): ("xar", "replay_sampling"),
    ("xar", "sampling_full_size"): ("xar", "replay_full_size"),
    ("paraformer", "frontend"): ("paraformer", "replay_frontend"),
    ("paraformer", "encoder"): ("paraformer", "replay_encoder"),
    ("paraformer", "decoder"): ("paraformer", "replay_decoder"),
    ("paraformer", "losses"): ("paraformer", "replay_losses"),
    ("paraformer", "specaug"): ("paraformer", "replay_specaug"),
    ("paraformer", "timestamps"): ("paraformer", "replay_timestamps"),
    ("paraformer", "cif"): ("paraformer_cif", "replay_cif"),
    ("paraformer", "predictor"): ("paraformer_cif", "replay_predictor"),
    ("paraformer", "train"): ("paraformer_models", "replay_training"),
    ("paraformer", "recognize"): ("paraformer_models", "replay_recognize"),
    ("paraformer", "seaco"): ("paraformer_models", "replay_seaco"),
    ("simcodec", "codec"): ("simcodec", "replay_codec"),
    ("kl16_vae", "autoencoder"): ("kl16_vae", "replay_autoencoder"),
    ("kl16_vae", "autoencoder_full_size"): ("kl16_vae", "replay_autoencoder"),
    ("gense", "lm_forward"): ("gense", "replay_language_models"),
    ("gense", "wavlm"): ("gense", "replay_wavlm"),
    ("gense", "pipeline"): ("gense", "replay_pipeline"),
    ("tokenflow", "tokenizer"): ("tokenflow", "replay_tokenizer"),
    ("tokenflow", "msvq"): ("tokenflow", "replay_scales"),
    ("tokenflow", "quantizer"): ("tokenflow", "replay_quantizer"),
    ("tokenflow", "losses"): ("tokenflow_losses", "replay_losses"),
    ("tokenflow", "preprocess"): ("tokenflow", "replay_preprocess"),
    ("tokenflow", "t2i"): ("tokenflow_t2i", "replay_t2i"),
    ("flextok", "fsq"): ("flextok", "replay_fsq"),
    ("flextok", "parts"): ("flextok", "replay_parts"),
    ("flextok", "vae"): ("flextok", "replay_vae"),
    ("flextok", "resampler"): ("flextok", "replay_resampler"),
    ("flextok", "full"): ("flextok", "replay_full"),
    ("flextok", "ar_class"): ("flexar", "replay_class"),
    ("flextok", "ar_text"): ("flexar", "replay_text"),
    ("seed", "tokenizer"): ("seed", "replay_tokenizer"),
    ("seed", "train_stage1_itc"): ("seed", "replay_stage1"),
    ("seed", "train_stage2"): ("seed", "replay_stage2"),
    ("seed", "unclip_decode"): ("seed_unclip", "replay_unclip"),
    ("seed", "multimodal_llm"): ("seed_llama", "replay_llm"),
    ("seed", "sequence_layout"): ("seed_llama", "replay_sequence"),
}


def replay_case(folder: str | Path, echo: Callable[[str], None] = print) -> bool:
    """Replay one case folder, one line a tensor through `echo`; True when every recorded tensor was met.

    Raises a MediatokError when the folder is not a case, is of an unknown kind or lacks an input.
    """
    case = read_case(folder)
    if (case.system, case.kind) not in KINDS:
        known = [kind for system, kind in KINDS if system == case.system]
        if not known:
            systems = sorted({system for system, _ in KINDS})
            raise InvalidInput(f"{case.folder}: unknown system '{case.system}'; known: {', '.join(systems)}")
        raise InvalidInput(f"{case.folder}: unknown kind '{case.kind}'.{nearest_names(case.kind, known)}")
    module, function = KINDS[case.system, case.kind]
    replay = Replay(case, echo)
    try:
        getattr(import_module(f".{module}", __package__), function)(replay)
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, MediatokError):
            raise
        # Recorded tensors or sizes that do not fit each other reach torch only here.
        reason = " ".join(str(error).split())[:200]
        raise InvalidInput(f"{case.folder} cannot be replayed: {type(error).__name__}: {reason}") from error
    return replay.finish()


def run(case_dirs: Iterable[str | Path], echo: Callable[[str], None] = print) -> bool:
    """Replay every case in `case_dirs` (case folders, or folders of them); True when all pass.

    A bad case does not stop the others; it is raised as InvalidInput at the end.
    """
    passed: list[bool] = []
    bad: list[str] = []
    for given in case_dirs:
        try:
            folders = find_cases(given)
        except MediatokError as error:
            bad.append(str(error))
            continue
        for folder in folders:
            try:
                passed.append(replay_case(folder, echo))
            except MediatokError as error:
                bad.append(str(error))
    if len(passed) + len(bad) > 1:
        echo(f"{sum(passed)} of {len(passed) + len(bad)} cases pass")
    if bad:
        raise InvalidInput("; ".join(bad))
    if not passed:
        raise InvalidInput("name at least one parity case folder")
    return all(passed)
