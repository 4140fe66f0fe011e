import pytest

from pixart.data.caption_checks import Problem, judge, problem

GOOD = [
    "A red circle on the left of a white background.",
    "An image sensor on a green circuit board, lit from above.",
    "A sign that reads 'I cannot wait', black letters on yellow wood.",
    "A photo of a brown bear.",
    "Two dogs, one black, one white, on a beach under dark clouds.",
    "A picture frame of gilded wood on a grey wall.",
    "A painting of two people at a table by a window, in oil.",
    "A scenic coast with cliffs, photographed from a boat.",
    "A drawing table with a lamp. The table is of oak.",
    "Sorry! is printed in large letters on a board game box.",
    "A woman with a sorry look, in a blue coat, beside a bus stop.",
    "An AI conference banner above a stage, purple light.",
    "Three books, three cups and three pens on a desk, in rows of three.",
    "A very, very small frog on a leaf.",
    "A man in a white shirt and a man in a black shirt at a wooden table.",
    "A bowl of soup. A spoon beside the bowl. Steam above the bowl.",
    "No parking sign on a brick wall.",
    "A camera on a tripod shows a mountain on its screen.",
    "A seashell, a shell of a crab and a shell of an egg.",
    "A close-up of a dandelion clock; seeds drift to the right.",
    "New York, New York, a neon sign in pink and blue.",
    "A 35 mm film strip with five frames of a running horse.",
    "Eine Katze auf einem roten Sofa.",
    "Here, a wooden signpost with painted letters, stands at a crossroads.",
    "An image sensor on a green board.",
    "A sign that reads 'I cannot wait' above a blue door.",
    'A sign that reads "I\'m sorry" on a brick wall.',
    "A poster with the words “As an AI, I dream” over a city at night.",
    "'I'm sorry, I can't' is written in white chalk on a blackboard.",
    "A brown dog runs across a wet beach. Grey waves break behind it.",
    "A photo of a red fox in deep snow, its head turned to the left.",
    "An oil painting of two boats in a harbour. Orange light lies on the water.",
    "Photo booth with a red curtain and a silver stool.",
    "Picture frames on a white wall, five in a row.",
    "In the picture gallery, three visitors stand before a large canvas.",
    "In the photo booth, two girls laugh.",
    "The photo album lies open on a wooden table.",
    "A photographer shows a print to a customer at a counter.",
    "A large screen displays a scene showing a beach to a crowd in a dark hall.",
    "A girl holds an old photo. The photo shows a soldier in uniform.",
    "A scene of a village market, painted in watercolour.",
    "A drawing board with a steel ruler and a pencil.",
    "A shot glass features on a shelf of bottles.",
    "A movie poster shows a man with a sword.",
    "An AI-generated robot face in chrome, lit from the left.",
    "As an AI-made render, a chrome sphere on a black plane.",
    "Sorry-looking grey dog on a porch.",
    "A red circle on the left, a red circle on the right, and a red circle in the middle.",
    "A small red square, a small red circle and a small blue square on a white ground.",
    "A very, very, very tall tower of grey stone.",
    "Rows of chairs, rows of tables and rows of lamps in a hall.",
    "A stadium clock reads 10:45. Thousands of people in yellow fill the seats.",
    "A black T-shirt with '#1 DAD' in white letters.",
    "A pile of 1000000000 dollars in notes, drawn as a cartoon.",
    "A serial number '000000000000000' on a steel plate.",
    "A neon sign saying 'ha ha ha ha ha ha ha ha' over a bar.",
    "A cup of café au lait and a crème brûlée on a zinc table, 3.5 cm apart.",
    "A man (left) and a woman [right] on a bench; a dog between them - all wet.",
    "A whiteboard with the equation x + 2 = 5 in blue.",
    "A smiling woman in a red coat 😀 painted on a balloon.",
    'A screenshot of a text editor with the tag "</div>" in green.',
    "Two hands hold a heart of paper, less than < 3 cm wide.",
    "Image stabiliser of a camera lens, taken apart, on grey felt.",
    "The sun sets behind a lighthouse. In the foreground, a fence runs to the sea.",
    "Here a road ends at a lake, under a low grey sky.",
    "a photo of a brown bear",
    "a red circle on the left",
]
BAD = {
    "empty": [
        "",
        " \n.",
        "...",
        " \n\t",
        ".",
        '""',
    ],
    "refusal": [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I cannot identify people.",
        "I cannot describe this image.",
        "As an AI language model, I do not see pictures.",
        "Unfortunately, I am unable to view it.",
        "I am unable to see the picture.",
        "There is no image attached.",
        "Please provide an image.",
        "I\u2019m sorry, I can\u2019t describe this image.",
        "I am unable to view images.",
        "I cannot identify the people in this image.",
        "Sorry, but I cannot assist with that.",
        "As an AI language model, I have no eyes.",
        "As an artificial intelligence, I cannot see.",
        "Unfortunately, the image is too dark.",
        "My apologies, the file could not be read.",
        "A dog. However, I cannot tell its breed.",
        "There is no image provided.",
        "Please provide an image to describe.",
        "\"I'm sorry, I can't help.\"",
        "I don't see an image here.",
    ],
    "narration": [
        "The image shows a dog on a beach.",
        "This image depicts two people.",
        "The photograph captures a sunset.",
        "In this photo we see a red car.",
        "In the picture, a cat sleeps.",
        "This black and white photo features a bridge.",
        "We can see a house on a hill.",
        "The scene depicts a market.",
        "This is an image of a dog.",
        "Sure! A dog on a beach.",
        "Caption: a dog on a beach.",
        "Here is a caption: a dog.",
        "The image shows a dog on grass.",
        "This picture depicts a dog.",
        "In this photo we see a dog on grass.",
        "In the image, a dog runs.",
        "The black and white photograph captures a street in the rain.",
        "The image is a close-up of a flower.",
        "A painting depicts two boats in a harbour.",
        "An image showing a dog.",
        "We can see a dog on grass.",
        "I see a dog.",
        "Here is a caption for the image: a dog on grass.",
        "Sure! A dog on grass.",
        "Caption: a dog on grass",
        "The scene features a long table.",
        "A dog on grass. The image also shows a red ball.",
        "A dog on grass. In the image, there is a red ball.",
    ],
    "repetition": [
        "the the the the the",
        "A dog dog dog dog on a beach.",
        "A man on a bench. A man on a bench.",
        "red ball on grass red ball on grass red ball on grass red ball on grass",
        "the the the the",
        "A dog on a dog on a dog on a dog on a dog.",
        "A dog dog dog dog dog dog on grass.",
        "A red ball. A dog runs on grass. A dog runs on grass.",
        "A tree and a house and a tree and a car, with a tree and a dog, and a tree and a bird, and a tree and a cat.",
        "A wall wallwallwallwallwallwallwall",
        "A dog aaaaaaaaaaaaaaaaaaaaa",
        "A large brown dog runs over wet grass , , , , , , , , , , , , , , ,",
        "A white house with a blue door, a white house with a blue door, a white house with a blue door.",
        "Grey sky over grey sky over grey sky over grey sky over the sea.",
    ],
    "no text": [
        '{"caption": "a dog"}',
        "- a dog\n- a ball",
        "1. A dog on a beach",
        "**A dog** on a beach",
        "<|im_start|>assistant a dog",
        "```a dog```",
        "A dog\x07 on a beach",
        "A dog \ufffd on a beach",
        "A dog\x00 on grass.",
        "A dog \ufffd\ufffd on grass.",
        "A dog on grass.<|im_end|>",
        "<|im_start|>assistant\nA dog.",
        "[INST] Describe [/INST] A dog.",
        "<p>A dog on grass.</p>",
        "A dog<br>on grass",
        '{"caption": "A dog on grass."}',
        '{"caption": "A dog on',
        '["dog", "grass"]',
        "```\nA dog on grass.\n```",
        "**Subject:** a dog on grass",
        "# A dog\nIt runs on grass.",
        "- a dog\n- a ball\n- grass",
        "1. A dog\n2. A ball",
        "A dog [on grass](dog.png)",
        "A dog.\\nIt runs.",
        "<think>The user wants a caption.</think> A dog.",
        "0 0 1 // >>> == 4 a",
    ],
}


@pytest.mark.parametrize("text", GOOD)
def test_captions_that_are_good(text):
    assert problem(text) is None


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_captions_that_are_not(name, text):
    assert problem(text) == name


def test_every_problem_has_its_examples():
    assert {*BAD, Problem.CUT} == set(Problem)


def test_a_cut_answer_ends_with_its_last_whole_sentence():
    assert judge("A dog on grass. It holds a red ball in its", cut=True) == ("A dog on grass.", None)
    assert judge("A dog on grass.", cut=True) == ("A dog on grass.", None)
    assert judge("A dog on grass. It runs", cut=False) == ("A dog on grass. It runs", None)


def test_a_cut_answer_without_a_whole_sentence_is_kept():
    assert judge("A dog on grass that holds a red", cut=True) == ("A dog on grass that holds a red", Problem.CUT)
    assert judge("", cut=True) == ("", Problem.EMPTY)


def test_loops_run_until_they_are_cut():
    assert judge("A dog on a dog on a dog on a dog on a", cut=True)[1] == Problem.REPETITION
    assert judge("A dog on grass. It is is is is is is", cut=True) == ("A dog on grass.", None)


def test_a_list_is_seen_by_its_lines():
    assert judge("Dogs:\n- a brown dog\n- a black dog", cut=False)[1] == Problem.NO_TEXT
