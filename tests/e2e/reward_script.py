"""A reward model with TRL over shards, which is refused."""

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig, RewardConfig, RewardTrainer, ScriptArguments, TrlParser

from ds_cp import TrainerMixin


class Sharded(TrainerMixin, RewardTrainer):
    pass


def main(arguments: list[str]) -> RewardTrainer:
    script, config, model = TrlParser((ScriptArguments, RewardConfig, ModelConfig)).parse_args_and_config(arguments)
    return Sharded(
        model=AutoModelForSequenceClassification.from_pretrained(model.model_name_or_path, num_labels=1),
        args=config,
        train_dataset=load_dataset(script.dataset_name)["train"],
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
    )
