"""fewstep inside other programs: nodes for ComfyUI, a model repository for Triton."""
