"""What the first users of fewstep met, each finding with what holds it now: a test, or a place that says why not.

A row is (finding, place, words). A place is `file.py::test` under `tests/`, or a file of the project. Words, if there
are any, stand in that test (its parameters included), or in that file, whatever its lines.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EDITING, LEAN, PYTHON = "runtime/test_prompt_editing.py", "test_lean.py", "runtime/test_python.py"
FIELDS, MODELS, HTTP = "serving/test_http_fields.py", "serving/test_models.py", "serving/test_http.py"
CHANGE, PAGE, LOOKS = "runtime/test_interchange.py", "serving/test_page.py", "serving/test_page_looks.py"
HELP, GRID, PACKAGING = "commands/test_help.py", "commands/test_grid.py", "test_packaging.py"
PARTS, PASS = "runtime/test_adapter_parts.py", "runtime/test_second_pass.py"
MARKS = f"{EDITING}::test_marks_that_nothing_does_are_refused_by_name"
EFFECTS = f"{EDITING}::test_what_has_no_effect_is_said"
LINE = f"{HELP}::test_a_mistake_is_a_line"
MISSING = f"{LEAN}::test_what_is_missing_is_named"

ROWS = [
    # words of a prompt
    ("a LoRA's tag in a plain prompt changed the picture", MARKS, "a cat <lora:style:0.8>"),
    ("so did a hypernetwork's, in either syntax", MARKS, "<hypernet:style:0.8>"),
    ("so did ComfyUI's embedding:name", MARKS, "embedding:easynegative"),
    ("so did AND, where A1111's syntax is read", MARKS, "AND in a prompt"),
    ("why AND is not done", "docs/prompts.md", "`AND` adds up the guidance of several prompts"),
    ("AND in a plain prompt was a word in silence", EFFECTS, "holds AND, read here as a word"),
    (
        "a LoRA's tag was a word in A1111's syntax too",
        "runtime/test_lora_doors.py::test_tags_of_a_prompt_are_loras",
        "",
    ),
    ("[a:b:0.5] and [a|b] were words", f"{EDITING}::test_editing_and_alternation_are_the_prompts_put_in_by_hand", ""),
    ("weights in plain prompts were words in silence", EFFECTS, "(word:1.3)"),
    ("a negative prompt without effect was taken in silence", EFFECTS, "no effect at guidance 1"),
    ("so was a sampler that does not suit", EFFECTS, "does not suit"),
    (
        "--for says yes to all samplers of a student without a preset",
        "docs/samplers.md",
        "judged by what its network predicts",
    ),
    (
        "the warning of a cut prompt named Python's option alone",
        "commands/test_asking.py::test_cut_prompts_are_told",
        "--long-prompts chunk",
    ),
    ("it does not show what was cut", "docs/prompts.md", "no log holds prompts"),
    # an install without torch, a machine without a driver, memory that does not suffice
    ("documented commands ended in tracebacks", f"{LEAN}::test_every_documented_command_ends_in_our_words", ""),
    ("a backend of torch's named no extra", MISSING, ""),
    (
        "bench, which loads as Python does, told to import a module",
        f"{LEAN}::test_python_s_doors_end_in_our_errors",
        "",
    ),
    (
        "backends of GPUs named a module instead of the driver",
        f"{LEAN}::test_a_missing_driver_is_told_before_what_would_be_of_no_use",
        "",
    ),
    ("Python's doors raised ModuleNotFoundError", f"{LEAN}::test_python_s_doors_end_in_our_errors", ""),
    ("verify lost what it had judged", f"{LEAN}::test_what_was_judged_without_torch_is_told", ""),
    ("an extra for GPUs brought no torch", f"{PACKAGING}::test_whoever_runs_on_a_gpu_gets_torch", ""),
    ("a remedy named an option that run has not", "test_remedies.py::test_every_flag_in_a_text_exists", ""),
    (
        "running out of memory was a RuntimeError beside red noise",
        "commands/test_memory.py::test_running_out_of_memory_is_typed",
        "done.stderr ==",
    ),
    (
        "the estimate was not asked",
        "commands/test_memory.py::test_what_does_not_fit_is_said_by_what_the_error_names",
        "",
    ),
    (
        "a full disk was told without where, of engines",
        "engines/test_refused_writes.py::test_how_much_was_needed_is_said",
        "",
    ),
    ("and of pictures", "runtime/test_refused_outputs.py::test_a_full_disk_is_told_with_what_and_where", ""),
    # Python
    ('load("student") did not work', f"{PYTHON}::test_the_embedded_models_go_by_name_wherever_a_bundle_is_taken", ""),
    ("load takes no hub id", "docs/checkpoints.md", "`fewstep.load` takes the bundle, and downloads nothing"),
    ('pipe("x", stepz=3) passed mypy', f"{PYTHON}::test_a_wrong_call_fails_to_type_check", "stepz"),
    ("and named no argument that is near", f"{PYTHON}::test_a_wrong_argument_is_refused_with_the_nearest", "stepz"),
    ("dir(fewstep) hid what it has", f"{PYTHON}::test_a_shell_completes_what_is_not_loaded_yet", ""),
    ("a result printed whole arrays", f"{PYTHON}::test_reprs_fit_a_line", ""),
    ("a notebook showed no picture", f"{PYTHON}::test_a_notebook_shows_the_pictures", ""),
    ("a pipeline could not be closed", f"{PYTHON}::test_a_pipeline_is_closed_at_the_end_of_a_with", ""),
    # diffusers' words
    ("load_lora_weights was an AttributeError", "runtime/test_loras.py::test_diffusers_own_methods", ""),
    ("so was enable_vae_tiling, and its like", f"{PARTS}::test_methods_that_change_no_picture_say_what_is_done", ""),
    ("so was .unet", f"{PARTS}::test_replaced_components", ""),
    ("options of from_pretrained were TypeErrors", f"{PARTS}::test_options_of_loading_are_refused_by_name", ""),
    ('.to("cuda") returned in silence', f"{PARTS}::test_devices_and_precisions", ""),
    (
        "what is not done was no typed error",
        f"{PARTS}::test_what_diffusers_has_and_this_has_not_is_refused_by_name",
        "",
    ),
    ("LoRAs only at export", "runtime/test_lora_doors.py::test_the_command_line", ""),
    ("no ControlNet", "runtime/test_control.py::test_one_control", ""),
    ("no IP-Adapter", "runtime/test_control.py::test_a_picture_as_prompt", ""),
    ("no textual inversion", "runtime/test_run_time_embeddings.py::test_words_are_learned_and_forgotten", ""),
    ("no nine-channel inpainting", "export/test_refusals_by_name.py::test_inpainting_unets", ""),
    # what A1111's and ComfyUI's users ask for
    ("no second pass at a higher resolution", f"{PASS}::test_a_picture_made_larger_is_two_calls", ""),
    ("no networks that upscale", "docs/prompts.md", "Networks that upscale are not read."),
    ("no variation of a seed", f"{PASS}::test_a_variation_is_a_call_with_that_noise", ""),
    ("no prompt matrix", f"{CHANGE}::test_a_prompt_matrix_is_all_combinations_in_the_web_ui_s_order", ""),
    (
        "samplers were refused without a verb, or without a reason",
        "schedules/test_names_and_refusals.py::test_a_refused_sampler_is_a_sentence_with_its_reason",
        "DPM++ 2S a Karras",
    ),
    (
        "a single file needs a base",
        "docs/checkpoints.md",
        "A single file holds weights and nothing else, so `--base` names",
    ),
    (
        "a .ckpt was refused without a way out",
        "export/test_bad_checkpoints.py::test_a_pickle_is_converted_as_the_document_says",
        "",
    ),
    ("a picture's text was not in A1111's words", f"{CHANGE}::test_a_picture_speaks_the_web_ui_s_words", ""),
    ("A1111's pictures were not read", f"{CHANGE}::test_run_from_a_picture_of_theirs", ""),
    ("nor was one's own made again", f"{CHANGE}::test_run_from_a_picture_of_ours", ""),
    ("a sheet carried no call", f"{CHANGE}::test_sheets_carry_their_call", ""),
    ("pictures said a user's name", f"{CHANGE}::test_no_picture_says_where_it_was_made", ""),
    (
        "a grid had no axis of negative prompts or sizes",
        f"{GRID}::test_pictures_of_several_sizes_and_one_that_cannot_be",
        "negative=red",
    ),
    ("no ranges, and no cfg", f"{GRID}::test_ranges_are_read_as_the_web_ui_writes_them", "cfg=1-2[3]"),
    (
        "one impossible cell stopped it",
        f"{GRID}::test_pictures_of_several_sizes_and_one_that_cannot_be",
        "not every picture can be",
    ),
    # HTTP
    ("no inpainting", f"{HTTP}::test_a_masked_edit_repaints_what_is_clear", ""),
    ("no prompt weights and no clip skip", f"{FIELDS}::test_prompts_are_read_as_the_pipeline_reads_them", ""),
    ("no second size by request", f"{FIELDS}::test_a_size_by_request", ""),
    ("no LoRA by request", "serving/test_http_adapters.py::test_loras_are_named_in_a_request", ""),
    (
        "a name that is not there was a bare 404",
        f"{FIELDS}::test_a_model_that_is_not_here_is_answered_with_those_that_are",
        "",
    ),
    ("the word that was served was no name", f"{MODELS}::test_the_first_model_goes_by_the_command_lines_word_too", ""),
    ("nothing told of --alias", "docs/deployment.md", "`--alias gpt-image-1 --alias dall-e-3` adds them"),
    ("an unknown field was not named", f"{HTTP}::test_a_field_that_is_not_known_is_named", ""),
    ("seed -1 was an error", f"{FIELDS}::test_seed_minus_one_is_random", ""),
    ("and named no way to a random one on the command line", LINE, "Leave it out for a random one."),
    ("no other origins", "serving/test_origins.py::test_a_preflight_of_a_named_origin", ""),
    ("one model a process", f"{MODELS}::test_each_request_gets_its_models_picture_though_one_fits_at_a_time", ""),
    ("no loading and unloading", f"{MODELS}::test_models_are_loaded_and_unloaded_by_name", ""),
    ("one token, no limits by client", "serving/test_callers.py::test_a_caller_has_so_many_requests_a_minute", ""),
    ("no traceparent", "serving/test_tracing.py::test_a_trace_stands_in_the_log", ""),
    ("no OpenTelemetry", "serving/test_tracing.py::test_opentelemetrys_span_has_the_callers_for_parent", ""),
    ("logs were JSON on a terminal", "serving/test_logs.py::test_a_terminal_gets_plain_lines_and_a_file_json", ""),
    ("readiness was not said", f"{HTTP}::test_sigterm_finishes_what_was_accepted_and_refuses_the_rest", '{"ready",'),
    ("/ was 404", "serving/test_pages.py::test_the_first_page_says_how_to_ask_and_its_example_works", ""),
    ("/docs was 404", "serving/test_pages.py::test_docs_name_every_call_and_field", ""),
    ("no jobs and webhooks", "docs/deployment.md", "There are no jobs to ask after and no webhooks"),
    # the live page
    ("a quick stroke was three dots", f"{PAGE}::test_a_quick_stroke_is_one_line_and_can_be_taken_back", ""),
    ("half of a wide window was blank", f"{LOOKS}::test_on_a_wide_window_no_half_is_blank", ""),
    ("on a phone the picture was below the fold", f"{LOOKS}::test_on_a_phone_the_picture_comes_first_and_whole", ""),
    ("states were codes, and rest was 0 frames a second", f"{LOOKS}::test_states_are_words", "which reads as broken"),
    ("seed -5 was taken, and an old error stayed", f"{PAGE}::test_seeds", "-5"),
    (
        "a negative prompt was open where it does nothing",
        f"{PAGE}::test_a_negative_prompt_is_open_where_it_has_an_effect",
        "",
    ),
    ("a reload forgot all", f"{PAGE}::test_settings_and_the_drawing_are_there_again", ""),
    ("no camera beside the result", f"{PAGE}::test_the_camera_is_beside_the_result", ""),
    ("no upload, drop or paste", f"{PAGE}::test_a_picture_is_brought_and_followed", ""),
    ("no save", f"{PAGE}::test_a_picture_is_saved_as_it_is_shown", ""),
    ("no full screen", f"{PAGE}::test_full_screen", ""),
    ("no sampler and size", f"{PAGE}::test_sampler_schedule_and_size", ""),
    ("no presets", f"{PAGE}::test_presets", ""),
    # systems and packages
    ("export could not start on Windows", f"{PACKAGING}::test_nothing_needs_a_module_of_unix_to_be_imported", ""),
    ("nor make a bundle there", f"{PACKAGING}::test_a_checkpoint_becomes_a_picture_without_what_windows_lacks", ""),
    (
        "macOS tells its peak in bytes",
        "commands/test_memory.py::test_a_peak_is_in_bytes_where_the_system_tells_bytes",
        "",
    ),
    ("no word of which systems it is for", "README.md", "Nothing was run on Windows or macOS"),
    ("an extra for completion that did nothing", f"{HELP}::test_bash_completes", ""),
    ("and any other extra", f"{PACKAGING}::test_every_extra_is_used", ""),
    ("an image's context held the environment", f"{PACKAGING}::test_the_context_of_an_image_holds_no_environment", ""),
    ("ranges that fight with others'", f"{PACKAGING}::test_ranges_admit_what_is_tested_and_what_comes", ""),
    (
        "metadata without authors and classifiers",
        f"{PACKAGING}::test_the_metadata_say_who_what_and_for_which_python",
        "",
    ),
    ("a source archive without tests and documents", "MANIFEST.in", "graft docs graft examples graft tests"),
    ("in no index, without a changelog", "README.md", "fewstep is in no package index yet"),
    # the command line
    ("a mistake was 23 lines of usage", LINE, "neither a prompt nor prompt_embeds"),
    ("forty options in one list", f"{HELP}::test_the_help_of_verbs_with_many_options_is_in_groups", ""),
    ("an unknown option pointed to the wrong help, and to none that is near", LINE, "expected one like --seed"),
    ("inspect of no file spoke of bundles", LINE, "there is no file 'nosuch.png'"),
    ("PNG alone", f"{CHANGE}::test_every_format_says_how_it_was_made", ""),
    ("--output - wrote the file -.png", f"{CHANGE}::test_outputs_that_are_no_pictures", "goes to standard output"),
    ("image.png is replaced by each run", "commands/run.py", "default: image.png, replaced if it is there"),
    (
        "the export's bar wrote its stage with two colons",
        f"{HELP}::test_a_bar_whose_end_is_not_known_names_its_stage_once",
        "",
    ),
    ("nothing showed what a builder says", f"{HELP}::test_a_build_says_what_its_backend_does_when_asked", ""),
]


@functools.cache
def collected(file: Path) -> dict[str, str]:
    """The tests that pytest collects of a file, each with its source, decorators included."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def fault(place: str, words: str) -> str | None:
    """Why a place does not hold a finding, if it does not."""
    name, _, test = place.partition("::")
    file = (ROOT / "tests" / name if name.endswith(".py") and not (ROOT / name).is_file() else ROOT / name).resolve()
    if not file.is_file() or not file.is_relative_to(ROOT):
        return f"there is no file {name}"
    if test and test not in collected(file):
        return f"there is no test {place}"
    held = collected(file)[test] if test else file.read_text(encoding="utf-8")
    return None if " ".join(words.split()) in " ".join(held.split()) else f"{place} does not say {words!r}"


@pytest.mark.parametrize(("finding", "place", "words"), ROWS, ids=[r[0] for r in ROWS])
def test_every_finding_is_held(finding: str, place: str, words: str) -> None:
    assert words or "::" in place, "a file alone holds nothing"
    assert (reason := fault(place, words)) is None, f"{finding}: {reason}"


def test_a_finding_that_is_no_longer_held_is_noticed() -> None:
    assert fault(LINE, "") is None
    assert "no file" in str(fault("commands/test_gone.py::test_x", ""))
    assert "no test" in str(fault(f"{HELP}::test_gone", ""))
    assert "does not say" in str(fault(LINE, "words that stand nowhere"))
    assert "does not say" in str(fault("README.md", "words that stand nowhere"))
    findings = [f for f, _, _ in ROWS]
    assert len(set(findings)) == len(findings)
