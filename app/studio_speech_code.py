"""What the Speech tab did, as Python and as commands, for "Show code"."""

from __future__ import annotations

import shlex

from .studio_code import safe_stem
from .studio_speech_actions import NOISE_RATE, NOISE_SEED, Coded, Enhanced, Mixed, Spoken, Transcribed


def _load(source: str) -> list[str]:
    return ["import mediatok as mt", "", f"model = mt.load({source!r})"]


def codec_python(coded: Coded) -> str:
    """Python that encodes and decodes the clip."""
    name, stem = coded.name, safe_stem(coded.name)
    lines = _load(coded.source)
    if coded.before is None:
        lines.append(f"tokens = mt.Tokens.load({name!r})")
    else:
        lines += [f"tokens = model.encode({name!r})", f'tokens.save("{stem}.mtok")  # {coded.tokens.num_bytes} bytes']
    return "\n".join([*lines, "sound = model.decode(tokens)", f'sound.save("{stem}-decoded.wav")'])


def codec_command(coded: Coded) -> str:
    """Commands that encode and decode the clip."""
    name, stem, model = shlex.quote(coded.name), safe_stem(coded.name), _model(coded.source)
    if coded.before is None:
        return f"mediatok decode {name} {model} --out {stem}-decoded.wav"
    return (
        f"mediatok encode {name} {model} --out {stem}.mtok\n"
        f"mediatok decode {stem}.mtok {model} --out {stem}-decoded.wav"
    )


def noise_python(mixed: Mixed) -> list[str]:
    """Lines that make the noisy clip; none where no noise was added."""
    if mixed.noise == "none":
        return []
    return [
        "import numpy as np",
        "from mediatok.training.noise import add_noise, make_noise",
        "",
        f"clip = mt.read_audio({mixed.clip.name!r}, {NOISE_RATE}).samples[0]",
        f"noise = make_noise({mixed.noise!r}, len(clip), np.random.default_rng({NOISE_SEED}))",
        f"noisy = add_noise(clip, noise, {mixed.snr:g})",
        f"mt.Waveform(noisy / max(1, noisy.abs().max()), {NOISE_RATE}).save({noisy_name(mixed)!r})",
        "",
    ]


def enhance_python(enhanced: Enhanced) -> str:
    """Python that makes the clip noisy and clean again."""
    lines = _load(enhanced.source)
    options = f"seed={enhanced.seed}"
    options += ", greedy=True" if enhanced.greedy else ""
    options += "" if enhanced.greedy or enhanced.temperature == 1 else f", temperature={enhanced.temperature:g}"
    return "\n".join([
        lines[0], *(noise_python(enhanced.mixed) or [""]), lines[2],
        f"sound = model.enhance({noisy_name(enhanced.mixed)!r}, {options})",
        f'sound.save("{safe_stem(enhanced.mixed.clip.name)}-enhanced.wav")',
    ])  # fmt: skip


def enhance_command(enhanced: Enhanced) -> str:
    """The command that makes the noisy clip clean."""
    name, stem = noisy_name(enhanced.mixed), safe_stem(enhanced.mixed.clip.name)
    options = " --greedy" if enhanced.greedy else ""
    options += "" if enhanced.greedy or enhanced.temperature == 1 else f" --temperature {enhanced.temperature:g}"
    command = (
        f"mediatok enhance {shlex.quote(name)} {_model(enhanced.source)} --seed {enhanced.seed}{options} "
        f"--out {stem}-enhanced.wav"
    )
    return command if enhanced.mixed.noise == "none" else f"# {name} is the button Noisy .wav.\n{command}"


def noisy_name(mixed: Mixed) -> str:
    """File name of the noisy clip, which is the clip itself where no noise was added."""
    return mixed.clip.name if mixed.noise == "none" else f"{safe_stem(mixed.clip.name)}-noisy.wav"


def transcribe_python(heard: Transcribed) -> str:
    """Python that writes the clip down."""
    stem = safe_stem(heard.clip.name)
    hotwords = f", hotwords={list(heard.hotwords)!r}" if heard.hotwords else ""
    lines = [*_load(heard.source), f"transcript = model.transcribe({heard.clip.name!r}{hotwords})"]
    return "\n".join([*lines, "print(transcript.text)", f'transcript.save("{stem}.srt")'])


def transcribe_command(heard: Transcribed) -> str:
    """The command that writes the clip down."""
    name, stem = shlex.quote(heard.clip.name), safe_stem(heard.clip.name)
    hotwords = f" --hotwords {shlex.quote(','.join(heard.hotwords))}" if heard.hotwords else ""
    return f"mediatok transcribe {name} {_model(heard.source)}{hotwords} --format srt --out {stem}.srt"


def speak_python(spoken: Spoken) -> str:
    """Python that says the text."""
    lines = [*_load(spoken.source), f"sound = model.speak({spoken.text!r}, seed={spoken.seed})"]
    return "\n".join([*lines, f'sound.save("spoken-{spoken.seed}.wav")'])


def speak_command(spoken: Spoken) -> str:
    """The command that says the text."""
    text, model = shlex.quote(spoken.text), _model(spoken.source)
    return f"mediatok speak {text} {model} --seed {spoken.seed} --out spoken-{spoken.seed}.wav"


def _model(source: str) -> str:
    return f"--model {shlex.quote(source)}"
