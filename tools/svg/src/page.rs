// SPDX-License-Identifier: Apache-2.0

//! Pages from templates: one file, no outside resources.

/// The style that all pages share.
const STYLE: &str = include_str!("page.css");

/// A page from its template: each `@NAME@` becomes its value, `@STYLE@` the style that all pages share.
pub fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let style = ("STYLE", STYLE.trim_end());
    values
        .iter()
        .chain([&style])
        .fold(template.to_owned(), |page, (name, value)| {
            page.replace(&format!("@{name}@"), value)
        })
}

/// What is wrong with a page, for tests: names without a value, figures that are no numbers, pictures that do not end,
/// resources from elsewhere.
pub fn faults(page: &str) -> Vec<String> {
    let names = page
        .split('@')
        .skip(1)
        .filter(|text| text.starts_with(|c: char| c.is_ascii_uppercase()));
    let mut found: Vec<String> = names.map(str::to_owned).collect();
    for wrong in ["NaN", "inf\"", "http://", "https://"] {
        if page.contains(wrong) {
            found.push(wrong.to_owned());
        }
    }
    if page.matches("<svg").count() != page.matches("</svg>").count() {
        found.push("<svg".to_owned());
    }
    found
}

/// A picture as wide as its box, or wider than a narrow one, which scrolls then: its texts stay readable.
pub fn scrolling(picture: &str) -> String {
    format!("<div class=\"scroll\">{picture}</div>")
}

/// For tests that make pages of made-up figures: leaves one where a browser is to look at it, in the folder that
/// `DREX_PAGES_OUT` names, if it is set.
pub fn leave(name: &str, page: &str) {
    if let Some(folder) = std::env::var_os("DREX_PAGES_OUT") {
        let path = std::path::Path::new(&folder).join(name);
        std::fs::write(&path, page).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_its_values_and_the_style() {
        let page = fill("<style>@STYLE@</style>@A@ and @B@", &[("A", "1")]);
        assert!(page.contains("--page:") && page.ends_with("</style>1 and @B@"));
        assert_eq!(faults(&page), ["B"]);
        assert_eq!(
            faults("<svg><a href=\"https://x\">NaN"),
            ["NaN", "https://", "<svg"]
        );
    }
}
