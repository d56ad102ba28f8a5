"""Captions say what they mean, training never sees what is held out, and the checker tells right from wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from scipy import ndimage

from xdit_compile.evaluation.checker import judge, look
from xdit_compile.evaluation.drawing import draw
from xdit_compile.evaluation.ideal import scene_of
from xdit_compile.evaluation.prompts import held_out_captions, questions
from xdit_compile.evaluation.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Mention,
    Request,
    draw_scene,
    held_out,
    held_out_requests,
    parse,
    phrase,
    training_scenes,
    vocabulary,
)

SIDES = (128, 256, 512)
RED_STAR = Mention("red", "star", "large", "top left")
PAIR = Request((Mention("red", "circle"), Mention("blue", "square")), "to the left of", "white", False)


def some(count: int, things: int, seed: int = 5):
    """Random scenes with everything that can be said of them."""
    rng = random.Random(seed)
    return [draw_scene(rng, things) for _ in range(count)]


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("things", [1, 2])
def test_a_caption_is_parsed_back_in_every_order(things: int, order: int):
    for _, request in some(300, things):
        assert parse(request.caption(order)) == request


@pytest.mark.parametrize("things", [1, 2])
def test_what_a_caption_leaves_out_is_parsed_as_unsaid(things: int):
    rng = random.Random(3)
    left_out = 0
    for _, request in some(300, things):
        said = parse(phrase(rng, request))
        assert said is not None
        for found, full in zip(said.mentions, request.mentions, strict=True):
            assert (found.colour, found.shape) == (full.colour, full.shape)
            assert found.size in (None, full.size) and found.place in (None, full.place)
        left_out += said != request
    assert left_out > 30


@pytest.mark.parametrize(
    "caption",
    [
        "a lighthouse at dusk",
        "",
        "a red",
        "a crimson circle on a white background",
        "a red circle and a blue square",
        "a red circle to the left of a blue square above a green star",
        "a red circle in the top left corner at the bottom",
        "a red circle above",
    ],
)
def test_other_captions_are_not_understood(caption: str):
    assert parse(caption) is None


def test_case_and_punctuation_do_not_matter():
    assert parse("A large RED star, in the top left corner.") == Request((RED_STAR,))


@pytest.mark.parametrize("things", [1, 2])
def test_held_out_requests_are_distinct_and_held_out(things: int):
    found = held_out_requests(1, 200, things)
    assert len({caption for _, caption in found}) == 200
    for request, caption in found:
        assert held_out(request)
        assert len(request.mentions) == things
        assert parse(caption) == request
    assert found == held_out_requests(1, 200, things)
    assert found != held_out_requests(2, 200, things)


def test_training_never_sees_what_is_held_out():
    drawn = list(itertools.islice(training_scenes(0), 5000))
    assert not any(held_out(request) for _, request in drawn)
    forbidden = {caption for things in (1, 2) for _, caption in held_out_requests(1, 500, things)}
    assert not forbidden & {request.caption(order) for _, request in drawn for order in range(4)}
    rng = random.Random(0)
    random_share = sum(held_out(draw_scene(rng, 1)[1]) for _ in range(5000)) / 5000
    assert 0.05 < random_share < 0.15


def test_every_word_of_every_caption_is_known():
    known = set(vocabulary())
    used = {word for things in (1, 2) for _, request in some(500, things) for word in request.caption(0).split()}
    assert used <= known
    assert known - used == {"medium"}, "a thing of medium size is one of which nothing is said"


def test_captions_of_an_evaluation_mix_one_thing_and_two():
    captions = held_out_captions(7, 12)
    assert len(set(captions)) == 12
    asked = questions(captions, 100)
    assert [len(one.request.mentions) for one in asked] == [1, 1, 1, 2] * 3
    assert [one.seed for one in asked] == list(range(100, 112))
    assert len(held_out_captions(7, 1)) == 1
    assert questions(["a fox"], 0)[0].request is None


@pytest.mark.parametrize("side", [pytest.param(side, marks=pytest.mark.slow if side > 256 else ()) for side in SIDES])
@pytest.mark.parametrize("things", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_checker_finds_every_drawn_scene_right(things: int, side: int):
    verdicts = [judge(request, draw(scene, side)) for scene, request in some(150, things)]
    assert all(verdict.right for verdict in verdicts)
    assert sum(all(dataclasses.astuple(verdict)) for verdict in verdicts) >= 145


def test_the_ideal_scene_shows_what_was_asked_for():
    for things in (1, 2):
        for request, _ in held_out_requests(3, 100, things):
            assert judge(request, draw(scene_of(request, 1), 256)).right
    partly = Request((Mention("pink", "heart"),))
    assert judge(partly, draw(scene_of(partly, 1), 256)).right
    assert scene_of(partly, 1) == scene_of(partly, 1) != scene_of(partly, 2)


def test_floats_are_seen_as_bytes_are():
    scene, _ = some(1, 2)[0]
    image = draw(scene, 256)
    assert look(image) == look(image.astype(np.float32) / 255)


@pytest.mark.parametrize("things", [1, 2])
def test_blurred_and_noisy_pictures_are_still_read(things: int):
    noise = np.random.default_rng(0)
    right = 0
    for scene, request in some(100, things):
        image = draw(scene, 256).astype(np.float32) / 255
        image = ndimage.gaussian_filter(image, (1.5, 1.5, 0)) + noise.normal(0, 0.03, image.shape).astype(np.float32)
        right += judge(request, image.clip(0, 1)).right
    assert right >= 95


CHANGES = {
    "colour": {"colour": "blue"},
    "shape": {"shape": "circle"},
    "place": {"place": "bottom right"},
    "size": {"size": "small"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_one_wrong_thing_is_named_and_nothing_else(what: str):
    asked = Request((RED_STAR,), None, "white", False)
    shown = Request((dataclasses.replace(RED_STAR, **CHANGES[what]),), None, "white", False)
    verdict = judge(asked, draw(scene_of(shown, 0), 256))
    assert [field.name for field in dataclasses.fields(verdict) if not getattr(verdict, field.name)] == [what]
    assert verdict.right == (what == "size")


def test_a_wrong_background_is_named():
    asked, shown = (Request((RED_STAR,), None, ground, False) for ground in ("white", "gray"))
    verdict = judge(asked, draw(scene_of(shown, 0), 256))
    assert verdict.right and not verdict.background


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_swapped_relation_is_wrong(relation: str):
    opposite = dict(zip(RELATIONS, ("to the right of", "to the left of", "below", "above"), strict=True))
    for shown_as in RELATIONS:
        image = draw(scene_of(dataclasses.replace(PAIR, relation=shown_as), 0), 256)
        verdict = judge(dataclasses.replace(PAIR, relation=relation), image)
        assert verdict.right == verdict.place == (shown_as == relation)
    swapped = dataclasses.replace(PAIR, mentions=PAIR.mentions[::-1], relation=opposite[relation])
    assert judge(dataclasses.replace(PAIR, relation=relation), draw(scene_of(swapped, 0), 256)).right


def test_colours_of_two_things_exchanged_are_wrong():
    shown = dataclasses.replace(PAIR, mentions=(Mention("blue", "circle"), Mention("red", "square")))
    assert not judge(PAIR, draw(scene_of(shown, 0), 256)).right


def test_a_missing_a_further_or_no_thing_is_a_wrong_count():
    scene = scene_of(PAIR, 0)
    one = draw(dataclasses.replace(scene, things=scene.things[:1]), 256)
    none = draw(dataclasses.replace(scene, things=()), 256)
    alone = Request((Mention("red", "circle"),))
    for request, image in ((PAIR, one), (PAIR, none), (alone, none), (alone, draw(scene, 256))):
        verdict = judge(request, image)
        assert not verdict.count and not verdict.right
    assert judge(alone, one).right


def test_noise_is_nothing_that_was_asked_for():
    noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    assert not any(judge(request, noise).right for things in (1, 2) for _, request in some(20, things))


@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64), (1, 64, 64, 3), (64, 64, 4)])
def test_an_array_of_another_form_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="form"):
        look(np.zeros(shape, np.uint8))


def test_scenes_draw_everything_the_grammar_has():
    requests = [request for things in (1, 2) for _, request in some(600, things)]
    mentions = [mention for request in requests for mention in request.mentions]
    assert {mention.colour for mention in mentions} == set(COLOURS)
    assert {mention.shape for mention in mentions} == set(SHAPES)
    assert {mention.size or "medium" for mention in mentions} == set(SIZES)
    assert {mention.place for mention in mentions} - {None} == set(PLACES)
    assert {request.background for request in requests} == set(BACKGROUNDS)
    assert {request.relation for request in requests} - {None} == set(RELATIONS)


@pytest.mark.parametrize("things", [1, 2])
def test_what_was_seen_and_judged_can_be_written_as_json(things: int):
    rng = random.Random(things)
    for _ in range(8):
        scene, request = draw_scene(rng, things)
        image = draw(scene, 128)
        json.dumps([dataclasses.asdict(judge(request, image)), dataclasses.asdict(look(image))])
