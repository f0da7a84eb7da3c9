"""Refine-by-Align for ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # not at the top: test runners import this file where there is no ComfyUI
    from .nodes import RefineByAlignExtension

    return RefineByAlignExtension()
