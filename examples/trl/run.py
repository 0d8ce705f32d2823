"""TRL's GRPO on the quickstart's task, with token credit from a ``g2r serve``:

    g2r serve --config examples/quickstart/serve.yaml &
    python examples/trl/run.py --url http://127.0.0.1:8000 --steps 50

or with the judge in this process:

    python examples/trl/run.py --config examples/quickstart/serve.yaml --steps 50

The policy is the quickstart's model; its frozen copy is the judge. Needs trl. Prints the mean score of every step.
"""

import argparse
import json
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from g2r_megatron.adapters.trl import CreditSource, CreditTrainer
from g2r_megatron.client import Judge
from g2r_megatron.config import parsing
from g2r_megatron.config.serve_options import ServeConfig
from g2r_megatron.data.tokenizer_files import load_tokenizer

QUICKSTART = Path(__file__).parents[1] / "quickstart"


def dataset() -> Dataset:
    """The quickstart's prompts as its policy reads them, and rubrics."""
    rows = [json.loads(line) for line in (QUICKSTART / "data" / "train.jsonl").read_text().splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": f"user: {row['prompt']}",
                "judge_prompt": row["prompt"],
                "rubric": [{"criterion": item["criterion"], "weight": float(item["weight"])} for item in row["rubric"]],
            }
            for row in rows
        ]
    )


def make_trainer(judge: CreditSource, steps: int, output: str) -> CreditTrainer:
    """As the quickstart's config.yaml: 6 prompts a step with 8 responses each."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    arguments = GRPOConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=48,
        num_generations=8,
        max_completion_length=42,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=1234,
    )
    tokenizer = load_tokenizer(QUICKSTART / "model")
    return CreditTrainer(judge, model=model, args=arguments, train_dataset=dataset(), processing_class=tokenizer)


def open_judge(url: str, config: str | None) -> CreditSource:
    """The service at ``url``, or with a ``config`` of g2r serve its judge in this process."""
    if config is None:
        return Judge(url)
    from g2r_megatron.serve.local import LocalJudge

    return LocalJudge(parsing.parse(ServeConfig, "run.py", ["--config", config]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--config", help="of g2r serve: judge in this process")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    judge = open_judge(options.url, options.config)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(judge, options.steps, output)
        trainer.train()
        for record in trainer.state.log_history:
            if "reward" in record:
                print(f"step {record['step']}: score {record['reward']:.3f}")


if __name__ == "__main__":
    main()
