//! From the command line, the environment and the file to one settings value.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shared::config::{Layers, Loaded, Secret};

/// Flags of `run` and `check`.
#[derive(Debug, clap::Args)]
pub struct SettingsArgs {
    /// Configuration file; without it, embedded defaults.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where data rests; overrides the file and the environment.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Any other key, as `--set mqtt.listen=127.0.0.1:1884`; may be given many times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl SettingsArgs {
    /// The configuration file, if there is one.
    pub fn config_file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Lays file, environment (`PREFIX__KEY__KEY`) and flags over the defaults.
    pub fn load<T: DeserializeOwned + Serialize>(&self, prefix: &str) -> anyhow::Result<Loaded<T>> {
        let mut layers = match &self.config {
            None => Layers::empty(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the configuration file {}", path.display()))?;
                Layers::file::<T>(&path.display().to_string(), &text)?
            }
        };
        layers.env::<T>(prefix, std::env::vars())?;
        if let Some(dir) = &self.data_dir {
            layers.flag::<T>("--data-dir", "data_dir", dir)?;
        }
        for pair in &self.set {
            let (key, value) = pair.split_once('=').context(
                "--set: expected KEY=VALUE as --set mqtt.listen=127.0.0.1:1884, and what came has no = (it is not shown, \
                 for it may be a secret)",
            )?;
            layers.flag::<T>("--set", key.trim(), value)?;
        }
        Ok(layers.load()?)
    }
}

/// A secret given in place or as a file; the file's surrounding white space is not part of it.
pub fn secret(key: &str, value: Option<&Secret>, file: Option<&Path>) -> anyhow::Result<Option<Secret>> {
    match (value, file) {
        (Some(_), Some(_)) => anyhow::bail!("both {key} and {key}_file are set: keep one of them"),
        (Some(value), None) => {
            anyhow::ensure!(!value.is_empty(), "{key} is empty: give it a value, or name a file with {key}_file");
            Ok(Some(value.clone()))
        }
        (None, Some(path)) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("{key}_file: cannot read {}", path.display()))?;
            let text = text.trim();
            anyhow::ensure!(!text.is_empty(), "{key}_file: {} is empty", path.display());
            Ok(Some(Secret::new(text.to_owned())))
        }
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_is_empty_is_refused() {
        let empty = Secret::new(String::new());
        let refused = secret("[[mqtt.user]] password", Some(&empty), None).unwrap_err().to_string();
        assert!(refused.starts_with("[[mqtt.user]] password is empty"), "{refused}");
        let some = Secret::new("value".to_owned());
        assert_eq!(secret("key", Some(&some), None).unwrap().unwrap().reveal(), "value");
        assert!(secret("key", Some(&some), Some(Path::new("file"))).is_err());
        assert!(secret("key", None, None).unwrap().is_none());
    }
}
