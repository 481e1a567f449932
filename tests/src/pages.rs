//! Pages in Markdown.

/// Where a page's links to other files lead, as it has them.
pub fn links(page: &str) -> impl Iterator<Item = &str> {
    let targets = page.split("](").skip(1);
    let targets = targets.filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    let of_files = targets.filter(|target| !target.contains("://") && !target.starts_with('#'));
    of_files.map(|target| target.split('#').next().unwrap_or(target))
}
