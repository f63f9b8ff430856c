//! The file to which a VM was last saved, or from which it was restored, kept inside QEMU.
//!
//! As the record of a save ([`super::record`]), it is the data of a `secret` object, though nothing in it
//! is secret: it ends with QEMU, no part of the machine depends on it, and no stream contains it. It names
//! the file by its id; the path only says where to look first.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Vm, VmError};

/// The id of the object.
const LAST_ID: &str = "vmfile-last";

#[derive(Debug, Serialize, Deserialize)]
struct LastFile {
    id: String,
    path: PathBuf,
}

impl Vm {
    /// Returns the id and the path of the file to which this VM was last saved, or from which it was
    /// restored; `None` if there is none, or if a newer version has noted it in another form.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn last_file(&mut self) -> Result<Option<(String, PathBuf)>, VmError> {
        let data = self.qom_get(&format!("/objects/{LAST_ID}"), "data")?;
        let text = data.as_ref().and_then(|data| data.as_str()).unwrap_or_default();
        let found: Option<LastFile> = serde_json::from_str(text).ok();
        Ok(found.map(|LastFile { id, path }| (id, path)))
    }

    /// Notes that the VM is in the file with this id.
    ///
    /// # Errors
    ///
    /// See [`Qmp::execute`](crate::Qmp::execute).
    pub fn note_last_file(&mut self, id: &str, path: &Path) -> Result<(), VmError> {
        // Without symbolic links, which may lead to another file later.
        let real = path.canonicalize().or_else(|_| std::path::absolute(path));
        let path = real.unwrap_or(path.to_path_buf());
        let last = LastFile { id: id.to_owned(), path };
        let data = serde_json::to_string(&last)
            .map_err(|source| VmError::system("note the file", std::io::Error::other(source)))?;
        let object = format!("/objects/{LAST_ID}");
        if self.qom_get(&object, "data")?.is_some() {
            let arguments = json!({ "path": object, "property": "data", "value": data });
            self.execute("qom-set", arguments)?;
        } else {
            let object = json!({ "qom-type": "secret", "id": LAST_ID, "data": data });
            self.execute("object-add", object)?;
        }
        Ok(())
    }
}
