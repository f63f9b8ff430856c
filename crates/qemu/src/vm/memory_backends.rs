//! The memory backends of guest RAM.

use std::path::PathBuf;

use serde_json::Value;

use super::{Vm, VmError, text_of};
use crate::qmp::unexpected;

/// One memory backend of a running VM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryBackend {
    /// Its id, e.g. `pc.ram` for the one that QEMU makes by itself.
    pub id: String,
    /// Its size in bytes.
    pub size: u64,
    /// Other processes that have it mapped see the guest's writes.
    pub share: bool,
    /// Its QOM type, e.g. `memory-backend-memfd`.
    pub kind: String,
    /// The file or directory that it uses, if its type has one.
    pub path: Option<PathBuf>,
    /// Its own option `hugetlb` puts its memory into huge pages.
    pub hugetlb: bool,
}

impl Vm {
    /// Returns the memory backends, also the one that QEMU makes for a plain `-m`.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn memory_backends(&mut self) -> Result<Vec<MemoryBackend>, VmError> {
        let answer = self.execute("query-memdev", Value::Null)?;
        let backends = answer.as_array().ok_or_else(|| unexpected("query-memdev", "list"))?;
        backends.iter().map(|backend| self.memory_backend(backend)).collect()
    }

    fn memory_backend(&mut self, backend: &Value) -> Result<MemoryBackend, VmError> {
        let id = backend.get("id").and_then(text_of).unwrap_or_default();
        let size = backend.get("size").and_then(Value::as_u64);
        let path = format!("/objects/{id}");
        let kind = self.qom_get(&path, "type")?.and_then(|kind| text_of(&kind));
        let mem_path = self.qom_get(&path, "mem-path")?.and_then(|path| text_of(&path));
        let hugetlb = self.qom_get(&path, "hugetlb")?.and_then(|on| on.as_bool());
        Ok(MemoryBackend {
            size: size.ok_or_else(|| unexpected("query-memdev", "size"))?,
            share: backend.get("share").and_then(Value::as_bool).unwrap_or(false),
            kind: kind.unwrap_or_default(),
            path: mem_path.map(PathBuf::from),
            hugetlb: hugetlb.unwrap_or(false),
            id,
        })
    }
}
