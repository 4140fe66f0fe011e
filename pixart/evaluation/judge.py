"""A vision-language model as the judge of images, by the vLLM engine: answers in one token, and captions."""

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from pixart.config.captions import CaptionsConfig
from pixart.data.captions.captioner import MAX_PIXELS, conversation, resize_for_model
from pixart.data.captions.validation import validate_answer
from pixart.data.captions.vllm_engine import context_length, make_engine
from pixart.evaluation.prompt_following import Judgement, Question, judge_answer, normalized

INSTRUCTION = "Answer in one word."
MAX_LABELS = 128  # tokens whose probabilities are requested for a question


class Judge:
    """Answers questions about images, and captions images, with one engine; greedy, so that results repeat."""

    def __init__(self, model: str, captions: CaptionsConfig, *, dtype: str = "auto") -> None:
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ValueError(
                f"judge {model}: {error}; install vllm, or set python.judge in the cluster profile"
            ) from None
        self.name = f"{model}, vllm {vllm.__version__}"
        self.captions = captions
        self._engine = make_engine(
            model,
            max_model_len=context_length(captions.image_instruction, captions.max_tokens),
            dtype=dtype,
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs={"max_pixels": MAX_PIXELS},
        )
        self._tokenizer: Any = self._engine.get_tokenizer()
        # Strings that a single token stands for, by their id; an answer of several tokens cannot be judged in one.
        self._tokens = {index: self._tokenizer.decode([index]) for index in range(len(self._tokenizer))}
        self._ids: dict[str, list[int]] = {}

    def token_ids(self, question: Question) -> list[int]:
        """Return the tokens whose text is the right answer in any spelling; none if it has several tokens."""
        answer = normalized(question.answer)
        if answer not in self._ids:
            self._ids[answer] = [index for index, text in self._tokens.items() if normalized(text) == answer]
        return self._ids[answer][:MAX_LABELS]

    def answer(self, images: Sequence[Image.Image], questions: Sequence[Sequence[Question]]) -> list[list[Judgement]]:
        """Return the judgements of each image's questions; one whose right answer is no single token is not judged."""
        import vllm

        pairs = [
            (index, question)
            for index, several in enumerate(questions)
            for question in several
            if self.token_ids(question)
        ]
        small = [resize_for_model(image) for image in images]
        prompts = [
            self.prompt([{"type": "image"}, {"type": "text", "text": f"{question.text} {INSTRUCTION}"}], small[index])
            for index, question in pairs
        ]
        settings = [
            vllm.SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=self.token_ids(question))
            for _, question in pairs
        ]
        outputs = iter(self._engine.generate(prompts, settings, use_tqdm=False) if prompts else [])
        return [
            [
                self.judgement(question, next(outputs).outputs[0])
                if self.token_ids(question)
                else Judgement(probability=None, answer="")
                for question in several
            ]
            for several in questions
        ]

    def judgement(self, question: Question, output: Any) -> Judgement:
        """Return the judgement from the log-probabilities of the single token of an output."""
        logprobs, wanted = output.logprobs[0], set(self.token_ids(question))
        probabilities: dict[str, float] = {}
        for token, value in logprobs.items():
            if token in wanted:
                text = self._tokens[token]
                probabilities[text] = probabilities.get(text, 0.0) + math.exp(value.logprob)
        return judge_answer(question, probabilities, self._tokens[output.token_ids[0]])

    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """Return a caption of each image by the dataset's instruction; "" for one that fails the checks of captions."""
        import vllm

        instruction = self.captions.image_instruction
        text = self._tokenizer.apply_chat_template(
            conversation(instruction, {"type": "image"}), tokenize=False, add_generation_prompt=True
        )
        prompts = [{"prompt": text, "multi_modal_data": {"image": resize_for_model(image)}} for image in images]
        settings = vllm.SamplingParams(temperature=0, max_tokens=self.captions.max_tokens)
        captions = []
        for output in self._engine.generate(prompts, settings, use_tqdm=False):
            answer = output.outputs[0]
            caption, problem = validate_answer(answer.text, truncated=answer.finish_reason == "length")
            captions.append("" if problem else caption)
        return captions

    def prompt(self, content: list[dict[str, str]], image: Image.Image) -> dict[str, Any]:
        """Return the engine's prompt of a message with an image."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return {"prompt": text, "multi_modal_data": {"image": image}}
