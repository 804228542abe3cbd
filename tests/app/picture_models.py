"""Small random models of FlexTok, TokenFlow and SEED with their generators, for tests of commands and the studio."""

from pathlib import Path

import torch

TEXTS = ("red apple", "sad robot", "green apple")
FLEXTOK = {
    "num_tokens": 8, "levels": (5, 4, 3), "grid": (4, 4), "patch_size": 1, "encoder_width": 32, "encoder_depth": 2,
    "encoder_head_width": 16, "decoder_width": 48, "decoder_depth": 2, "decoder_head_width": 24, "latent_channels": 3,
    "vae_channels": (8, 8, 8), "vae_layers": 1, "vae_norm_groups": 4, "num_steps": 4, "guidance_scale": 2.0,
}  # fmt: skip
TOKENFLOW = {
    "image_size": 16, "sides": (1, 2, 4), "codebook_size": 40, "semantic_code_width": 6, "pixel_code_width": 3,
    "tower_width": 24, "tower_depth": 1, "tower_heads": 2, "tower_hidden": 32, "tower_patch": 4, "tower_grid": 4,
    "semantic_width": 24, "semantic_depth": 1, "semantic_heads": 2, "semantic_grid": 4, "teacher_width": 5,
    "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "z_channels": 8, "decoder_channels": 32,
    "decoder_res_blocks": 1,
}  # fmt: skip
SEED = {
    "image_size": 16, "patch_size": 4, "vision_width": 8, "vision_depth": 1, "vision_heads": 1, "vision_hidden": 8,
    "num_queries": 4, "qformer_width": 8, "qformer_depth": 1, "qformer_heads": 1, "qformer_hidden": 8,
    "codebook_size": 12, "token_size": 3, "decoder_depth": 1, "decoder_heads": 1, "head_widths": (4, 4, 4),
    "embedding_size": 8,
}  # fmt: skip
DRAWING = {"latent_channels": 2, "grid": 4, "width": 16, "depth": 1, "num_heads": 1}
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def save_picture_models(folder: Path) -> None:
    """Tokenizers flextok, tokenflow and seed; generators over them: classes, writer (prompts), storyteller (prompts).

    "writer" names its tokenizer by its name alone, as a model that was trained beside it does.
    """
    from mediatok.generators.next_scale_llama import NextScaleLlama
    from mediatok.generators.next_token import NextToken
    from mediatok.generators.seed_llama import SeedLLaMA
    from mediatok.generators.text_pieces import pieces_of
    from mediatok.tokenizers.image.flextok import FlexTok
    from mediatok.tokenizers.image.kl_vae import KLAutoencoder
    from mediatok.tokenizers.image.seed import Seed
    from mediatok.tokenizers.image.tokenflow import TokenFlow

    torch.manual_seed(0)
    flextok = randomised(FlexTok(**FLEXTOK), ("encoder", "decoder"))
    flextok.save_pretrained(folder / "flextok")
    tokenflow = randomised(TokenFlow(**TOKENFLOW), ("encoder", "decoder", "quant_conv", "post_quant_conv"))
    tokenflow.save_pretrained(folder / "tokenflow")
    KLAutoencoder(16, 2, (8, 8, 8), 1, 4).save_pretrained(folder / "latents")
    drawing = DRAWING | {"autoencoder": str(folder / "latents")}
    seed = randomised(Seed(**SEED, drawing_sizes=drawing), ("to_code", "qformer", "drawing"))
    seed.save_pretrained(folder / "seed")
    NextToken(
        width=32, depth=2, num_heads=2, hidden=48, vocab_size=flextok.vocab_size, num_tokens=8, num_classes=3,
        label_names=("apple", "robot", "none of these"), tokenizer=str(folder / "flextok"),
        tokenizer_fingerprint=flextok.fingerprint,
    ).save_pretrained(folder / "classes")  # fmt: skip
    NextScaleLlama(
        sides=TOKENFLOW["sides"], codebook_size=40, code_width=9, width=32, depth=2, num_heads=4, num_kv_heads=4,
        hidden=48, text_pieces=pieces_of(TEXTS), prompt_length=6, negative_prompt="", guidance_scale=3.0,
        tokenizer="tokenflow", tokenizer_fingerprint=tokenflow.fingerprint,
    ).save_pretrained(folder / "writer")  # fmt: skip
    first = len(LETTERS) + 3
    teller = SeedLLaMA(
        vocab_size=first + 14, first_code=first, num_codes=12, begin_image=first + 12, end_image=first + 13,
        image_tokens=4, hidden_size=24, intermediate_size=32, num_layers=2, num_heads=2, max_positions=200,
        prompt="plain", tokenizer=str(folder / "seed"), tokenizer_fingerprint=seed.fingerprint,
    )  # fmt: skip
    randomised(teller, ("llm",)).save_pretrained(folder / "storyteller")
    text_tokenizer().save(str(folder / "storyteller" / "tokenizer.json"))


@torch.no_grad()
def randomised(model, names: tuple[str, ...]):
    """`model` with weights under which tokens matter to pictures, and the other way round."""
    for name, parameter in model.named_parameters():
        if name.startswith(names) and parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


def text_tokenizer():
    """Letters as words."""
    from tokenizers.models import BPE

    from tokenizers import Tokenizer, decoders

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
