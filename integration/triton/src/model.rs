// SPDX-License-Identifier: Apache-2.0
//! A model of the repository: its configuration and its file.

use std::ffi::CStr;
use std::path::PathBuf;
use std::ptr::{null, null_mut};

use serde_json::Value;

use crate::settings::{self, Settings};
use crate::triton::abi;
use crate::triton::error::{Failure, check};

pub struct Model {
    pub name: String,
    pub version: u64,
    pub folder: PathBuf,
    /// Several responses for a request are allowed.
    pub decoupled: bool,
    pub settings: Settings,
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
            Ok(Self {
                settings: Settings::parse(&config)?,
                decoupled: config["model_transaction_policy"]["decoupled"] == true,
                folder: PathBuf::from(location).join(version.to_string()),
                name,
                version,
            })
        }
    }

    /// The GGUF file in the version folder.
    pub fn file(&self) -> Result<PathBuf, Failure> {
        if let Some(name) = &self.settings.model_file {
            let path = self.folder.join(name);
            if !path.is_file() {
                return Err(Failure::invalid(format!(
                    "parameters: model_file is \"{name}\", there is no file {}",
                    path.display()
                )));
            }
            return Ok(path);
        }
        let entries = std::fs::read_dir(&self.folder)
            .map_err(|error| Failure::invalid(format!("{}: {error}", self.folder.display())))?;
        let mut found: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
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
