//! Finds circles of files that use each other within a crate. Without circles, it is clear to which
//! file a line belongs.

use std::collections::{BTreeMap, BTreeSet};

use super::Finding;

/// The modules of one crate, each with the modules that it names.
type Graph = BTreeMap<String, BTreeSet<String>>;

/// Finds files of one crate that use one another in a circle.
pub(super) fn circles(files: &[(&str, &str)], findings: &mut Vec<Finding>) {
    let mut crates: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
    for &(path, text) in files {
        let Some((name, _)) = path.split_once("/src/") else { continue };
        if name.starts_with("crates/") || matches!(name, "testing" | "xtask") {
            crates.entry(name).or_default().push((path, text));
        }
    }
    for (name, files) in crates {
        let graph = graph(&format!("{name}/src/"), &files);
        for module in graph.keys() {
            if reaches(&graph, module, module) {
                let path = format!("{name}/src");
                let reason = format!("module {module} is in a circle: it needs what needs it");
                findings.push(Finding::new(&path, 1, reason));
            }
        }
    }
}

fn graph(source: &str, files: &[(&str, &str)]) -> Graph {
    let modules: Vec<(String, &str)> =
        files.iter().map(|(path, text)| (module(source, path), *text)).collect();
    let mut graph: Graph =
        modules.iter().map(|(name, _)| (name.clone(), BTreeSet::new())).collect();
    for (name, text) in &modules {
        // Tests are at the end of a file, and may use anything.
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let parent = name.rsplit_once("::").map_or("", |(parent, _)| parent);
        for (prefix, base) in [("crate::", ""), ("super::", parent)] {
            for named in named_after(code, prefix) {
                let full = if base.is_empty() { named } else { format!("{base}::{named}") };
                let found = longest_module(&graph, &full);
                if let Some(found) = found.filter(|found| found != name).map(str::to_owned) {
                    graph.entry(name.clone()).or_default().insert(found);
                }
            }
        }
    }
    graph
}

/// Returns a file's module: `save::direct` of `save/direct.rs`, `qmp` of `qmp/mod.rs`.
fn module(source: &str, path: &str) -> String {
    let path = path.strip_prefix(source).unwrap_or(path);
    let path = path.strip_suffix(".rs").unwrap_or(path);
    path.strip_suffix("/mod").unwrap_or(path).replace('/', "::")
}

/// Returns the longest beginning of a path that is a module.
fn longest_module<'a>(graph: &Graph, path: &'a str) -> Option<&'a str> {
    let mut rest = path;
    loop {
        if graph.contains_key(rest) {
            return Some(rest).filter(|module| !["lib", "main"].contains(module));
        }
        rest = rest.rsplit_once("::")?.0;
    }
}

/// Returns the paths that follow `prefix` in `code`: a single path, or the first words of a list in
/// braces.
fn named_after(code: &str, prefix: &str) -> Vec<String> {
    let is_in_path = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c);
    let path = |text: &str| {
        let end = text.find(|c| !is_in_path(c)).unwrap_or(text.len());
        text[..end].trim_end_matches(':').to_owned()
    };
    let mut named = Vec::new();
    for (start, _) in code.match_indices(prefix) {
        let rest = &code[start + prefix.len()..];
        match rest.strip_prefix('{').and_then(|list| list.split_once('}')) {
            Some((list, _)) => named.extend(list.split(',').map(|word| path(word.trim()))),
            None => named.push(path(rest)),
        }
    }
    named.retain(|path| !path.is_empty());
    named
}

/// Whether a walk from `from` along at least one step comes to `to`.
fn reaches(graph: &Graph, from: &str, to: &str) -> bool {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(module) = next.pop() {
        for needed in graph.get(module).into_iter().flatten() {
            if needed == to {
                return true;
            }
            if seen.insert(needed) {
                next.push(needed);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let mut findings = Vec::new();
        circles(files, &mut findings);
        findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn files_that_need_one_another_are_found() {
        let a = ("crates/x/src/a.rs", "use crate::{b, other};\n");
        let b = ("crates/x/src/b.rs", "use super::a::Thing;\n");
        let inner = ("crates/x/src/b/inner.rs", "use crate::a::Thing;\nuse super::Own;\n");
        let lib = ("crates/x/src/lib.rs", "mod a;\nmod b;\n");
        assert_eq!(found(&[a, b, lib]).len(), 2);
        assert!(found(&[a, inner, lib]).is_empty());
        // A file of the same name in another crate is another file.
        assert!(found(&[a, ("crates/y/src/b.rs", "use crate::a::Thing;\n")]).is_empty());
    }

    #[test]
    fn what_only_tests_need_is_no_circle() {
        let a = ("crates/x/src/a.rs", "use crate::b::Thing;\n");
        let b = ("crates/x/src/b.rs", "struct Thing;\n#[cfg(test)]\nuse crate::a::Other;\n");
        assert!(found(&[a, b]).is_empty());
    }
}
