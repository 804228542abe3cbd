"""Speech models with random weights, and something like a voice, for the tests of the studio."""

from pathlib import Path

import torch

RATE = 16000


def vowels(seconds: float = 2.0) -> torch.Tensor:
    """Something like a voice, fp32 [T]: harmonics under a moving envelope, in syllables."""
    time_T = torch.arange(int(seconds * RATE)) / RATE
    phase_T = 2 * torch.pi * torch.cumsum(120 + 20 * torch.sin(4 * time_T), 0) / RATE
    wave_T = sum(torch.sin(k * phase_T) / k * (1 + torch.cos(2 * k * time_T)) for k in range(1, 20))
    return 0.3 * wave_T / wave_T.abs().max() * torch.sin(10 * time_T).clamp(min=0).sqrt()


def save_speech_models(folder: Path) -> None:
    """A codec and an enhancer over it, a recogniser, and one with hotwords."""
    from mediatok.generators.gense import GenSE
    from mediatok.generators.paraformer import Paraformer
    from mediatok.tokenizers.speech.semantic import SemanticTokenizer
    from mediatok.tokenizers.speech.simcodec import SimCodec

    torch.manual_seed(0)
    codec = SimCodec(
        en_filters=2, de_filters=2, vq_dim=16, n_codes=64, resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),)
    )
    with torch.no_grad():
        codec.quantize.codebooks[0].normal_()
    codec.save_pretrained(folder / "random-codec")
    semantic = SemanticTokenizer(
        layer=1, hidden_size=16, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7, pos_conv_kernel=8,
        pos_conv_groups=2, num_buckets=8, max_distance=20, num_clusters=16,
    )  # fmt: skip
    semantic.save_pretrained(folder / "random-semantic")
    GenSE(
        num_semantic=16, num_acoustic=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        n2s_positions=1024, s2s_positions=2048, semantic_tokenizer=str(folder / "random-semantic"),
        codec=str(folder / "random-codec"),
    ).save_pretrained(folder / "random-enhancer")  # fmt: skip
    tokens = ["<blank>", "<s>", "</s>", "alpha", "brave", "cedar", "delta", "ember", "flint", "<unk>"]
    sizes = {"width": 16, "encoder_depth": 1, "encoder_heads": 2, "encoder_mlp_width": 16, "decoder_depth": 1}
    sizes |= {"decoder_heads": 2, "decoder_mlp_width": 16, "vocab_size": len(tokens), "tokens": tokens}
    hotwords = {"timestamp_times": 3, "hotword_depth": 1, "hotword_heads": 2, "hotword_mlp_width": 16}
    for name, more in (("random-listener", {**hotwords, "no_hotword_id": 9}), ("random-recogniser", {})):
        model = Paraformer(**sizes, **more)
        with torch.no_grad():
            model.predictor.out.weight.zero_()  # a token about every two frames ...
            model.decoder.head.bias[:3] = -99  # ... which is a word
        model.save_pretrained(folder / name)


def save_voice(folder: Path, codec: Path) -> None:
    """A model that speaks through `codec`, to the folder "random-voice" in `folder`."""
    from mediatok.generators.speak import Speak

    torch.manual_seed(0)
    sizes = {"encoder_depth": 1, "encoder_heads": 2, "encoder_mlp_width": 16, "encoder_taps": 3}
    sizes |= {"decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_width": 16, "decoder_taps": 3}
    Speak(vocab_size=64, tokens_per_character=3.0, width=16, **sizes, codec=str(codec)).save_pretrained(
        folder / "random-voice"
    )
