"""Supervised fine-tuning with TRL: text, prompts with completions or conversations; packed or padded; adapters by arguments."""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from ds_cp.trl import SFTTrainer


def main(arguments: list[str] | None = None) -> SFTTrainer:
    script, config, model = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(arguments)
    data = load_dataset(script.dataset_name)
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=config,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if config.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    main()
