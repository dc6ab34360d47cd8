// SPDX-License-Identifier: Apache-2.0
//! A model of the repository: its configuration and its file.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Weak};

use serde_json::Value;

use crate::engine::pool::Pool;
use crate::exit::{self, Stop};
use crate::load::Load;
use crate::settings::{self, Settings};
use crate::triton::abi;
use crate::triton::error::{Failure, check};

pub struct Model {
    pub name: String,
    pub version: u64,
    pub folder: PathBuf,
    /// Several responses for a request are allowed.
    pub decoupled: bool,
    /// Tensors have a leading dimension of 1, as with a `max_batch_size` above 0.
    pub leading: bool,
    /// Instances that `instance_group` asks for.
    pub instances: u32,
    pub settings: Settings,
    pub pool: Arc<Pool>,
    pub load: Arc<Load>,
    /// Instances that began to load.
    pub started: AtomicU32,
    pub next_id: AtomicU64,
}

impl Model {
    /// # Safety
    /// `model` is Triton's and live.
    pub unsafe fn new(model: *mut abi::Model) -> Result<Self, Failure> {
        // SAFETY: by the caller; texts of Triton live as long as the model.
        unsafe {
            let mut name = null();
            check(abi::TRITONBACKEND_ModelName(model, &mut name))?;
            let name = CStr::from_ptr(name).to_string_lossy().into_owned();
            let mut version = 0;
            check(abi::TRITONBACKEND_ModelVersion(model, &mut version))?;
            let (mut kind, mut location) = (0, null());
            check(abi::TRITONBACKEND_ModelRepository(
                model,
                &mut kind,
                &mut location,
            ))?;
            if kind != abi::ARTIFACT_FILESYSTEM {
                return Err(Failure::unsupported(format!(
                    "model {name}: a repository of type {kind}; only file systems (0) are read"
                )));
            }
            let location = CStr::from_ptr(location).to_string_lossy().into_owned();
            let mut config = read(model)?;
            let mut wanted = false;
            check(abi::TRITONBACKEND_ModelAutoCompleteConfig(
                model,
                &mut wanted,
            ))?;
            if wanted {
                config = settings::complete(&config);
                write(model, &config)?;
            }
            settings::check(&config)?;
            let settings = Settings::parse(&config)?;
            let load = Arc::new(Load::new(&name, version));
            let told = load.clone();
            let pool = Pool::new(settings.max_queue, Box::new(move |n| told.waiting(n)));
            exit::add(Arc::downgrade(&pool) as Weak<dyn Stop>);
            Ok(Self {
                settings,
                pool,
                load,
                started: AtomicU32::new(0),
                next_id: AtomicU64::new(1),
                leading: config["max_batch_size"].as_i64().unwrap_or(0) > 0,
                instances: instances(&config),
                decoupled: config["model_transaction_policy"]["decoupled"] == true,
                folder: PathBuf::from(location).join(version.to_string()),
                name,
                version,
            })
        }
    }

    /// The GGUF file in the version folder, which can be read.
    pub fn file(&self) -> Result<PathBuf, Failure> {
        let path = match &self.settings.model_file {
            Some(name) => self.folder.join(name),
            None => self.only_file()?,
        };
        readable(&path)?;
        Ok(path)
    }

    /// The file of exits beside it, which can be read.
    pub fn exits(&self) -> Result<Option<PathBuf>, Failure> {
        let Some(name) = &self.settings.exits else {
            return Ok(None);
        };
        let path = self.folder.join(name);
        readable(&path).map_err(|failure| Failure {
            text: format!("parameters: exits {}", failure.text),
            ..failure
        })?;
        Ok(Some(path))
    }

    fn only_file(&self) -> Result<PathBuf, Failure> {
        let exits = self.settings.exits.as_ref();
        let exits = exits.map(|name| self.folder.join(name));
        let entries = std::fs::read_dir(&self.folder)
            .map_err(|error| Failure::invalid(format!("{}: {error}", self.folder.display())))?;
        let mut found: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_model(path) && Some(path) != exits.as_ref())
            .collect();
        match found.len() {
            1 => Ok(found.remove(0)),
            n => Err(Failure::invalid(format!(
                "{} has {n} files *.gguf, must have one, or name one with the parameter model_file",
                self.folder.display()
            ))),
        }
    }
}

/// By its name: a file of exits may be beside the model, whether it is used or not.
fn is_model(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.ends_with(".gguf") && !name.ends_with(".exits.gguf")
}

/// Tells what is wrong with a path before llama.cpp calls it no GGUF file.
fn readable(path: &Path) -> Result<(), Failure> {
    let failure = |what: String| Err(Failure::invalid(format!("{}: {what}", path.display())));
    match std::fs::metadata(path) {
        Ok(about) if !about.is_file() => return failure("is not a file".into()),
        Ok(_) => {}
        Err(error) => {
            return match std::fs::read_link(path) {
                Ok(target) => failure(format!("is a link to {}: {error}", target.display())),
                Err(_) => failure(error.to_string()),
            };
        }
    }
    match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(error) => failure(error.to_string()),
    }
}

fn instances(config: &Value) -> u32 {
    let groups = config["instance_group"].as_array();
    let each = groups.into_iter().flatten().map(|group| {
        // Triton puts the count on each of the GPUs.
        let gpus = group["gpus"].as_array().map_or(0, Vec::len).max(1) as u64;
        group["count"].as_u64().unwrap_or(1).max(1) * gpus
    });
    each.sum::<u64>().clamp(1, 1024) as u32
}

/// # Safety
/// As `Model::new`.
unsafe fn read(model: *mut abi::Model) -> Result<Value, Failure> {
    // SAFETY: the message is ours, and deleted; its text is copied before.
    unsafe {
        let mut message = null_mut();
        check(abi::TRITONBACKEND_ModelConfig(
            model,
            abi::CONFIG_VERSION,
            &mut message,
        ))?;
        let (mut base, mut size) = (null(), 0);
        let read = check(abi::TRITONSERVER_MessageSerializeToJson(
            message, &mut base, &mut size,
        ));
        let parsed = read.and_then(|()| {
            serde_json::from_slice(std::slice::from_raw_parts(base.cast::<u8>(), size)).map_err(
                |error| Failure::internal(format!("the model's configuration is no JSON: {error}")),
            )
        });
        let _ = check(abi::TRITONSERVER_MessageDelete(message));
        parsed
    }
}

/// # Safety
/// As `Model::new`.
unsafe fn write(model: *mut abi::Model, config: &Value) -> Result<(), Failure> {
    let text = config.to_string();
    // SAFETY: Triton copies the text; the message stays ours.
    unsafe {
        let mut message = null_mut();
        check(abi::TRITONSERVER_MessageNewFromSerializedJson(
            &mut message,
            text.as_ptr().cast(),
            text.len(),
        ))?;
        let set = check(abi::TRITONBACKEND_ModelSetConfig(
            model,
            abi::CONFIG_VERSION,
            message,
        ));
        let _ = check(abi::TRITONSERVER_MessageDelete(message));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn instances_are_counted_over_groups_and_gpus() {
        let count = |groups: Value| instances(&json!({ "instance_group": groups }));
        assert_eq!(count(json!(null)), 1);
        assert_eq!(count(json!([{"count": 2, "kind": "KIND_CPU"}])), 2);
        assert_eq!(count(json!([{"count": 2, "gpus": [0, 1]}, {}])), 5);
    }

    #[test]
    fn a_file_of_exits_is_told_from_a_model() {
        let is = |name: &str| is_model(&Path::new("models/m/1").join(name));
        assert!(is("model.gguf") && is("exits.gguf"));
        assert!(!is("model.exits.gguf") && !is("model.gguf.txt") && !is("gguf"));
    }

    #[test]
    fn a_path_that_is_no_file_is_told_from_a_file_that_is_no_model() {
        let dir = std::env::temp_dir().join(format!("drex-model-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let link = dir.join("link.gguf");
        std::os::unix::fs::symlink("nowhere.gguf", &link).unwrap();
        let file = dir.join("file.gguf");
        std::fs::write(&file, "x").unwrap();
        let said = |path: &Path| readable(path).map_err(|failure| failure.text);
        assert_eq!(said(&file), Ok(()));
        assert_eq!(
            said(&link),
            Err(format!(
                "{}: is a link to nowhere.gguf: No such file or directory (os error 2)",
                link.display()
            ))
        );
        assert!(said(&dir).unwrap_err().ends_with("is not a file"));
        assert!(
            said(&dir.join("no.gguf"))
                .unwrap_err()
                .contains("No such file")
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
