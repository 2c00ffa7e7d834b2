"""From a folder to a model that can be asked for rows: loading, the gated LoRA, the attention
function."""
