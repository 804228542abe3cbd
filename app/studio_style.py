"""How the studio looks: Gradio's base theme with the system's fonts, one accent colour, and a dense layout."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

ACCENT = gr.themes.Color(
    c50="#eef6f8", c100="#d5e9ee", c200="#abd3de", c300="#79b7c8", c400="#4598ae", c500="#1f7a93", c600="#166379",
    c700="#124f61", c800="#113f4d", c900="#0f3440", c950="#08222b", name="accent",
)  # fmt: skip
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """Base theme, small sizes, no web fonts."""
    return gr.themes.Base(
        primary_hue=ACCENT, secondary_hue=ACCENT, neutral_hue=gr.themes.colors.slate, text_size=gr.themes.sizes.text_sm,
        spacing_size=gr.themes.sizes.spacing_sm, radius_size=gr.themes.sizes.radius_sm, font=SANS, font_mono=MONO,
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="#0e1318",
        background_fill_primary="white", background_fill_primary_dark="#161d24",
        background_fill_secondary="*neutral_100", background_fill_secondary_dark="#11171d",
        block_background_fill="white", block_background_fill_dark="#161d24",
        border_color_primary="*neutral_200", border_color_primary_dark="#2a343e",
        block_border_width="1px", block_shadow="none", block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent", block_label_border_width="0px", block_label_shadow="none",
        block_label_text_color="*neutral_500", block_label_text_color_dark="*neutral_400",
        block_label_text_weight="500",
        block_title_text_weight="500", block_title_text_size="*text_sm", block_info_text_size="12px",
        block_padding="8px 10px", layout_gap="8px", form_gap_width="0px", input_background_fill="*neutral_50",
        input_background_fill_dark="#0e1318",
        button_secondary_background_fill="white", button_secondary_background_fill_dark="#1d262f",
        button_secondary_background_fill_hover="*neutral_100", button_secondary_background_fill_hover_dark="#26313b",
        button_secondary_border_color="*neutral_300", button_secondary_border_color_dark="#36424e",
        button_border_width="1px", button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700", button_primary_text_color="white",
        button_small_padding="5px 10px", button_small_text_size="*text_sm", button_small_text_weight="500",
        slider_color="*primary_500", slider_color_dark="*primary_400",
    )  # fmt: skip


FOLDER = Path(__file__).parent


def page_style() -> dict:
    """Arguments of `Blocks.launch` that carry the looks."""
    script = (FOLDER / "studio.js").read_text()
    return {
        "theme": theme(),
        "css_paths": [FOLDER / "studio.css", FOLDER / "studio_shapes.css"],
        "head": f"<script>\n{script}</script>",
    }
